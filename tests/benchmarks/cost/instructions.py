"""How many instructions a proxy runs per request, counted by callgrind.

Instructions are the same however busy the machine is, so that a test can hold the gateway to a ratio. Valgrind must be
installed; it runs a proxy some fifty times slower.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import uvloop

from tests.benchmarks.cost.load import closed_loop
from tests.benchmarks.cost.proxies import Proxy

Opener = Callable[[], AbstractContextManager[Proxy]]
_CONNECTIONS = 4
_EVENTS, _PAUSE_MS = 100, 10


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
    """Instructions of the proxy's process for a request, or for a streamed event."""
    with tempfile.TemporaryDirectory(prefix="qg-instructions-") as directory:
        counts = Path(directory) / "counts"
        with _counted(proxy, counts) as running:
            request = running.target.request(stream=stream)
            uvloop.run(_send(running, request, requests))
            _control(running, "--instr=on")
            uvloop.run(_send(running, request, requests))
            _control(running, "--instr=off")
            _control(running, "--dump")
        dumped = next(file for file in Path(directory).glob("counts*") if b"totals:" in file.read_bytes())
        total = re.search(rb"^totals: (\d+)", dumped.read_bytes(), re.MULTILINE)
        assert total is not None
        return int(total[1]) / requests / (_EVENTS if stream else 1)


async def _send(proxy: Proxy, request: bytes, requests: int) -> None:
    await closed_loop(proxy.target, request, _CONNECTIONS, requests)


def _control(proxy: Proxy, verb: str) -> None:
    subprocess.run(["callgrind_control", verb, str(proxy.pids[0])], check=True, stdout=subprocess.DEVNULL)
