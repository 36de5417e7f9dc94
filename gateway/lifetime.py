"""How a process of the gateway runs and ends: its event loop, its signals, what goes on beside its requests."""

import asyncio
import ctypes
import gc
import itertools
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress

#: On shutdown: how long requests in flight may go on, then how long their settlements may take.
DRAIN_S = 25.0
SETTLE_S = 5.0

_KEPT_BYTES = 2**27
_LARGEST_KEPT_BYTES = 2**25  # glibc allows no more
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as <malloc.h> numbers its parameters


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the fastest event loop that this system has; None stands for Python's own."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:  # there is none for this system
        return None
    return uvloop.new_event_loop


def spare_garbage_collection() -> None:
    """Let the collector leave alone what lives as long as the process, and look less often at the rest: requests make
    hardly any cycles, and looking at 200,000 objects for each took a twelfth of their time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def keep_freed_memory() -> None:
    """Have the allocator keep up to _KEPT_BYTES that were freed, where it is glibc's: by itself it gives a large body's
    memory back to the kernel, and gets it again page by page for the next: 150 of the 600 µs of a 400 kB prompt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first signal to stop, and for the second. A closed terminal stops like Ctrl-C."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    before = itertools.count()  # signals alone count: stop may also be set by another process that got this one, too

    def heed() -> None:
        (hurry if next(before) else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, heed)
    return stop, hurry


@asynccontextmanager
async def running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """The work goes on for the time of the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
