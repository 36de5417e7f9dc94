"""How many instructions a proxy runs per request, counted by callgrind.

Instructions are the same however busy the machine is, so that a test can hold the gateway to a ratio. Valgrind must be
installed; it runs a proxy some fifty times slower.
"""

import asyncio
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import uvloop

from tests.benchmarks.cost.load import closed_loop
from tests.benchmarks.cost.measures import EVENTS
from tests.benchmarks.cost.proxies import Proxy

Opener = Callable[[], AbstractContextManager[Proxy]]
_CONNECTIONS = 4
#: By then the ledger's entries are archived, which belongs to the requests that made them.
_AFTER_S = 6.0


@contextmanager
def _counted(proxy: Opener, counts: Path) -> Iterator[Proxy]:
    """The proxy under callgrind, which does not count yet."""
    real = subprocess.Popen

    def under_callgrind(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        wrapped = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={counts}"]
        return real([*wrapped, *command], **options)  # type: ignore[call-overload,no-any-return]

    with patch.object(subprocess, "Popen", under_callgrind):
        opened = proxy()
        running = opened.__enter__()
    try:
        yield running
    finally:
        opened.__exit__(None, None, None)


def per_request(proxy: Opener, requests: int, *, stream: bool = False) -> float:
    """Instructions of the proxy's process for a request, or for a streamed event with its share of the request; without
    what the process does at the same time by itself, which its slowness would make too much of."""
    with tempfile.TemporaryDirectory(prefix="qg-instructions-") as directory:
        counts = Path(directory) / "counts"
        with _counted(proxy, counts) as running:
            request = running.target.request(stream=stream)
            after_s = 0.0 if stream else _AFTER_S  # a stream's one entry is nothing beside its events
            uvloop.run(_send(running, request, requests, after_s))
            started = time.monotonic()
            busy = _total(running, counts, lambda: uvloop.run(_send(running, request, requests, after_s)))
            took_s = time.monotonic() - started
            idle = _total(running, counts, lambda: time.sleep(took_s))
        return (busy - idle) / requests / (EVENTS if stream else 1)


def _total(proxy: Proxy, counts: Path, work: Callable[[], object]) -> int:
    """Instructions of the proxy while the work is done."""
    known = set(counts.parent.iterdir())
    _control(proxy, "--instr=on")
    work()
    _control(proxy, "--instr=off")
    _control(proxy, "--dump")
    totals = [
        re.search(rb"^totals: (\d+)", file.read_bytes(), re.MULTILINE) for file in set(counts.parent.iterdir()) - known
    ]
    return sum(int(total[1]) for total in totals if total is not None)


async def _send(proxy: Proxy, request: bytes, requests: int, after_s: float) -> None:
    await closed_loop(proxy.target, request, _CONNECTIONS, requests)
    await asyncio.sleep(after_s)


def _control(proxy: Proxy, verb: str) -> None:
    subprocess.run(["callgrind_control", verb, str(proxy.pids[0])], check=True, stdout=subprocess.DEVNULL)
