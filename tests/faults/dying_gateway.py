"""The real gateway, which kills itself at one of the awaits of its first request.

``python -m tests.faults.dying_gateway`` imports the gateway once and forks one for each order, a line of JSON on its
standard input: hundreds of deaths need no hundreds of starts. It prints the exit code of each once it has ended, before
which it takes no order; an empty line ends it at once. What its request waited for is in the order's report.
"""

import asyncio
import gc
import json
import os
import select
import signal
import sys
import traceback
import types
from collections.abc import Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal, NoReturn

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_writer import StreamWriter

import gateway.app
import gateway.config.load
from gateway.cli import main
from gateway.http.server import _Connection

#: When, of the await that a gateway dies at: once all that it wrote before is on its way, or when its answer has come.
Moment = Literal["sent", "answered"]

_PACKAGE = Path(gateway.app.__file__).parent
#: How long every write waits, as if the other side had no room for it just then.
_NO_ROOM_S = 0.001
_ours: ContextVar[bool] = ContextVar("ours", default=False)


@dataclass(frozen=True)
class Order:
    """A gateway: its configuration, its data directory, and the directory of the files that it writes on: stdout,
    stderr and report.

    die_at: the number of the await that it dies at, from 1; 0: at none.
    """

    config: str
    data_dir: str
    directory: str
    die_at: int
    moment: Moment

    @property
    def report(self) -> Path:
        """A line of JSON for each await, ``{"at", "chain"}``, and for each task that ended, ``{"ended", "left"}``."""
        return Path(self.directory) / "report"


class Watch:
    """Counts the awaits of the first request, and of every task that is made for it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._report = os.open(order.report, os.O_WRONLY | os.O_APPEND)
        self._count = 0
        self._left = 0
        self._began = False

    def install(self) -> None:
        """Watch the first request, plain or not, until its answer is written."""
        for name in ("_answer", "_handle_request"):
            self._hook(name)

    def _hook(self, name: str) -> None:
        watch, original = self, getattr(_Connection, name)

        async def handle(self: _Connection, *arguments: Any) -> Any:
            if watch._began:
                return await original(self, *arguments)
            watch._began = True
            ours = _ours.set(True)  # every task that is made from here on inherits it
            asyncio.get_running_loop().set_task_factory(watch._new_task)  # type: ignore[arg-type]
            try:
                return await watch._watched(original(self, *arguments))
            finally:
                _ours.reset(ours)

        setattr(_Connection, name, handle)

    def _new_task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(self._watched(work) if _ours.get() else work, loop=loop, **options)

    async def _watched(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert isinstance(work, types.CoroutineType)
        self._left += 1
        try:
            return await self._driven(work)
        finally:
            self._left -= 1
            self._say({"ended": work.__qualname__, "left": self._left})

    @types.coroutine
    def _driven(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run work as ``await`` would, and see each of its suspensions."""
        thrown: BaseException | None = None
        while True:
            try:
                waits_for = work.send(None) if thrown is None else work.throw(thrown)
            except StopIteration as end:
                return end.value
            number = self._suspended(work)
            thrown = None
            try:
                yield waits_for
            except BaseException as error:
                thrown = error
            if self._order.die_at == number and self._order.moment == "answered":
                _die()

    def _suspended(self, work: Coroutine[Any, Any, Any]) -> int:
        self._count += 1
        self._say(_place_of(work))
        if self._order.die_at == self._count and self._order.moment == "sent":
            # What the request wrote goes to the kernel by the end of the loop's next turn; no reply can come in before
            # the one after that.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, _die)
        return self._count

    def _say(self, what: dict[str, object]) -> None:
        os.write(self._report, json.dumps(what).encode() + b"\n")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _place_of(work: Coroutine[Any, Any, Any]) -> dict[str, object]:
    """Where work waits: the innermost line of the gateway, or of a library if it has none; and all functions."""
    frames = list(_frames(work))
    ours = [frame for frame in frames if _PACKAGE in Path(frame.f_code.co_filename).parents]
    inner = (ours or frames)[-1]
    path = Path(inner.f_code.co_filename)
    name = path.relative_to(_PACKAGE.parent) if ours else Path(*path.parts[-2:])
    return {"at": f"{name}:{inner.f_lineno}", "chain": " > ".join(frame.f_code.co_qualname for frame in frames)}


def _frames(waiting: object) -> Iterator[types.FrameType]:
    """The frames of a suspended coroutine, from its own to that which waits."""
    while waiting is not None:
        match waiting:
            case types.CoroutineType():
                frame, waiting = waiting.cr_frame, waiting.cr_await
            case types.GeneratorType():
                frame, waiting = waiting.gi_frame, waiting.gi_yieldfrom
            case types.AsyncGeneratorType():
                frame, waiting = waiting.ag_frame, waiting.ag_await
            case _:  # the step of an asynchronous generator, or a coroutine's iterator, does not say whose it is
                frame = None
                kinds = (types.CoroutineType, types.AsyncGeneratorType)
                waiting = next((one for one in gc.get_referents(waiting) if isinstance(one, kinds)), None)
        if frame is not None:
            yield frame


def _wait_at_every_write() -> None:
    """A write waits only where the other side has no room: let it have none, so that a gateway can die there."""
    drain = BaseProtocol._drain_helper

    async def wait_and_drain(self: BaseProtocol) -> None:
        await asyncio.sleep(_NO_ROOM_S)
        await drain(self)

    async def drain_always(self: StreamWriter) -> None:
        await self.protocol._drain_helper()

    BaseProtocol._drain_helper = wait_and_drain  # type: ignore[method-assign]
    StreamWriter.drain = drain_always  # type: ignore[method-assign]
    BaseProtocol.writing_paused = property(lambda _: True)  # type: ignore[assignment,method-assign]
    StreamWriter.write = partialmethod(StreamWriter.write, LIMIT=0)  # type: ignore[assignment]


def _become_gateway(order: Order) -> NoReturn:
    code = 1
    try:
        flags = os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(f"{order.directory}/stdout", flags), 1)
        os.dup2(os.open(f"{order.directory}/stderr", flags), 2)
        _wait_at_every_write()
        Watch(order).install()
        listeners = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
        code = main(["serve", "--config", order.config, "--data-dir", order.data_dir, *listeners])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve_orders() -> None:
    for line in sys.stdin:
        if line.strip():
            print(_exit_code_of(Order(**json.loads(line))), flush=True)


def _exit_code_of(order: Order) -> int:
    pid = os.fork()
    if pid == 0:
        _become_gateway(order)
    gone = os.pidfd_open(pid)
    # No order comes while a gateway lives: it is the line that ends it, or whoever gives orders has ended.
    if gone not in select.select([sys.stdin, gone], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(gone)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _serve_orders()
