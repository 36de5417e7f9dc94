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
from urllib.parse import urlsplit

import uvloop

from tests.benchmarks.cost.load import closed_loop
from tests.benchmarks.cost.measures import EVENTS
from tests.benchmarks.cost.proxies import Proxy
from tests.benchmarks.cost.upstream import ARRIVED

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


def per_request(proxy: Opener, requests: int, *, stream: bool = False, told: str | None = None) -> float:
    """Instructions of the proxy's process for a request, or for a streamed event with its share of the request; without
    what the process does at the same time by itself, which its slowness would make too much of.

    told: the model, if it wants to be told of events that have come."""
    with tempfile.TemporaryDirectory(prefix="qg-instructions-") as directory:
        counts = Path(directory) / "counts"
        with _counted(proxy, counts) as running:
            request = running.target.request(stream=stream)
            uvloop.run(_send(running, request, requests, told))
            started = time.monotonic()
            busy = _total(running, counts, lambda: uvloop.run(_send(running, request, requests, told)))
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


async def _send(proxy: Proxy, request: bytes, requests: int, told: str | None) -> None:
    if told is None:
        await closed_loop(proxy.target, request, _CONNECTIONS, requests)
    else:
        model = urlsplit(told)
        _, writer = await asyncio.open_connection(model.hostname, model.port)
        await closed_loop(proxy.target, request, _CONNECTIONS, requests, lambda events: writer.write(ARRIVED * events))
        writer.close()
    await asyncio.sleep(_AFTER_S)


def _control(proxy: Proxy, verb: str) -> None:
    subprocess.run(["callgrind_control", verb, str(proxy.pids[0])], check=True, stdout=subprocess.DEVNULL)
