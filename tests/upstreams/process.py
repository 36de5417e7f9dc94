"""Start a test upstream as a process of its own, so that a test can kill it, and end it by its pid."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: What an upstream prints once it answers, followed by its base URL.
READY = "listening on "

_START_SECONDS = 60
_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class ServerProcess:
    """A running upstream. base_url ends in /v1; pid and process are there for tests that kill it."""

    base_url: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def server_process(module: str, *options: str) -> Iterator[ServerProcess]:
    """Run ``python -m module options`` until the block ends.

    Raises RuntimeError with the process's output if it is not ready within a minute.
    """
    # A file, not a pipe: nobody reads along, and a full pipe would stop the server.
    with tempfile.NamedTemporaryFile(prefix="upstream-", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            cwd=_REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield ServerProcess(_wait_until_ready(process, Path(log.name)), process)
        finally:
            # It holds nothing worth an orderly end, and a request in flight would delay one.
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            if line.startswith(READY) and line.endswith("\n"):
                return line.removeprefix(READY).strip()
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not get ready:\n{log.read_text(errors='replace')}")
