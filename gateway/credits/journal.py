"""The settlement journal: settlements and voids that the store cannot take now, in files that outlive the process.

Each process appends to a file of its own and holds a lock on it (``flock``) that the kernel alone releases: a file
whose lock is free belongs to nobody alive, and whoever takes the lock next replays what is in it. No entry is ever
moved from one file to another.

A line is the CRC-32 of its JSON text as 8 hex digits, a space, the text, a newline. Its text is an entry, or
``{"done": reservation}`` once the store has taken that reservation's entry. Marks are not synced: a replay of what
was done before is harmless, because the store settles a reservation once.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A file that is longer takes no more entries: one that never gets done must not make it grow for ever.
MAX_FILE_BYTES = 1024 * 1024

_SUFFIX = ".journal"
_FILE_MODE, _DIRECTORY_MODE = 0o600, 0o700


class JournalError(Exception):
    """The journal cannot be written: the disk is full, or fails. The text is for the operator."""


class JournalEntry(NamedTuple):
    """What the store is still to be told about one reservation.

    cost_payg_nano, cost_plan_nano: the cost at list price and at the plan's rate; note: as the ledger keeps it;
    plan, rate_ppm, payg, created_ms, key_id, model: the reservation's, created_ms on the store's clock. All of
    these are for a settlement; a void has the defaults.
    """

    verb: Literal["settle", "void"]
    account: str
    reservation: str
    cost_payg_nano: int = 0
    cost_plan_nano: int = 0
    note: str = ""
    plan: str = ""
    rate_ppm: int = 0
    payg: bool = False
    created_ms: int = 0
    key_id: str = ""
    model: str = ""


class Journal:
    """The journal of one process in a directory that several share; one event loop uses it.

    Nothing is lost or written twice by a cancelled call: what was begun goes on.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current: _File | None = None
        self._files: list[_File] = []
        self._pending = 0
        self._batch: _Batch | None = None
        self._turn = asyncio.Lock()
        # Not the event loop's threads: while the store is away they may all be waiting for its name to resolve.
        # One thread, so that the files need no lock within the process.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")

    @property
    def pending(self) -> int:
        """How many entries on disk are not done, adopted ones included."""
        return self._pending

    async def open(self) -> None:
        """Make the directory if need be, and a file for this process. Raises JournalError."""
        try:
            await self._in_turn(self._open)
        except OSError as error:
            raise JournalError(f"the settlement journal in {self._directory} cannot be opened: {error}") from error

    async def close(self) -> None:
        """Let go of all files, after the calls that are on their way; what is not done stays for ``adopt``."""
        await self._in_turn(self._close)
        self._thread.shutdown()

    async def add(self, entry: JournalEntry) -> None:
        """Write the entry; it is on disk when this returns. Raises JournalError: then it is not written."""
        batch = self._next_batch()
        batch.entries.append(entry)
        if error := await asyncio.shield(batch.commit):
            raise JournalError(f"the settlement journal in {self._directory} cannot be written: {error}") from error

    async def done(self, reservation: str) -> None:
        """The store has taken the reservation's entry, or never will. Nothing happens if there is none."""
        batch = self._next_batch()
        batch.done.add(reservation)
        await asyncio.shield(batch.commit)

    async def adopt(self) -> list[JournalEntry]:
        """Take over the files of dead processes: their entries that are not done, oldest file first.

        Damaged lines are logged and skipped; their file is kept as ``*.damaged`` when all else in it is done.
        Files that cannot be read are logged and left for the next call. Raises JournalError if the directory
        cannot be read.
        """
        try:
            return await self._in_turn(self._adopt)
        except OSError as error:
            raise JournalError(f"the settlement journal in {self._directory} cannot be read: {error}") from error

    # --- taking turns -------------------------------------------------------------------------------------------

    def _next_batch(self) -> "_Batch":
        """What is written next. It fills until its turn comes: while one sync runs, all others wait for the next."""
        if self._batch is None:
            self._batch = batch = _Batch()
            batch.commit = asyncio.get_running_loop().create_task(self._commit_in_turn(batch))
        return self._batch

    async def _commit_in_turn(self, batch: "_Batch") -> OSError | None:
        async with self._turn:
            self._batch = None
            return await self._run(lambda: self._commit(batch))

    async def _in_turn(self, work: Callable[[], T]) -> T:
        async def wait() -> T:
            async with self._turn:
                return await self._run(work)

        return await asyncio.shield(asyncio.get_running_loop().create_task(wait()))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- in the thread ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if not self._directory.is_dir():
            self._directory.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            _sync_directory(self._directory.parent)
        self._current = self._create()

    def _create(self) -> "_File":
        fd = None
        while fd is None:
            path = self._directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
            # Another process may adopt, and delete, the new file before it is locked: then take another name.
            fd = _open_locked(path, os.O_CREAT | os.O_EXCL)
        file = _File(path, fd)
        try:
            _sync_directory(self._directory)
        except OSError:
            file.remove()
            raise
        self._files.append(file)
        return file

    def _close(self) -> None:
        self._current = None
        for file in list(self._files):
            if file.waiting:
                os.close(file.fd)
            else:
                self._finish(file)
        self._files.clear()

    def _commit(self, batch: "_Batch") -> OSError | None:
        error = self._write(batch.entries) if batch.entries else None
        for file in list(self._files):
            self._mark_done(file, file.waiting & batch.done)
        self._count()
        return error

    def _write(self, entries: list[JournalEntry]) -> OSError | None:
        file = self._current
        try:
            if file is None or file.end >= MAX_FILE_BYTES:
                file = self._current = self._create()
            file.append((entry._asdict() for entry in entries), sync=True)
        except OSError as error:
            log.error("the settlement journal in %s cannot be written: %s", self._directory, error)
            # After a failed sync nobody knows what is on disk. What went into this file before is still there; what
            # comes now goes into a new one.
            self._current = None
            if file is not None and not file.waiting:
                self._finish(file)
            return error
        file.waiting.update(entry.reservation for entry in entries)
        return None

    def _mark_done(self, file: "_File", reservations: set[str]) -> None:
        if not reservations:
            return
        file.waiting -= reservations
        if not file.waiting:
            self._finish(file)
            return
        try:
            file.append(({"done": reservation} for reservation in reservations), sync=False)
        except OSError as error:
            log.warning("%s: %s; what is done may be replayed, which changes nothing", file.path, error)

    def _finish(self, file: "_File") -> None:
        """Everything in the file is done: it is used again from its start, or goes."""
        try:
            if file is self._current:
                file.empty()
            else:
                self._files.remove(file)
                file.remove()
        except OSError as error:
            log.warning("%s: %s; what is done may be replayed, which changes nothing", file.path, error)

    def _adopt(self) -> list[JournalEntry]:
        adopted: list[JournalEntry] = []
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                adopted += self._adopt_file(path)
            except OSError as error:
                log.error("the settlement journal %s cannot be read: %s", path, error)
        self._count()
        return adopted

    def _adopt_file(self, path: Path) -> list[JournalEntry]:
        fd = _open_locked(path)  # also keeps our own files out: they are locked
        if fd is None:
            return []
        file = _File(path, fd)
        try:
            entries = file.load()
        except BaseException:
            os.close(fd)
            raise
        self._files.append(file)
        file.waiting = {entry.reservation for entry in entries}
        if not entries:
            self._finish(file)
        return entries

    def _count(self) -> None:
        self._pending = sum(len(file.waiting) for file in self._files)


@dataclass(slots=True)
class _Batch:
    """Entries and marks that share one write and one sync; commit ends with the error, if any."""

    entries: list[JournalEntry] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    commit: "asyncio.Task[OSError | None]" = field(init=False)


class _File:
    """A file whose lock this process holds. waiting: reservations with an entry in it that is not done."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.waiting: set[str] = set()
        self.end = 0
        self._damaged = False
        self._before_next = b""

    def append(self, values: Iterable[dict[str, object]], *, sync: bool) -> None:
        """Write lines behind the last good one. Raises OSError: then none of them counts."""
        lines = self._before_next + b"".join(map(_line, values))
        written = 0
        try:
            while written < len(lines):
                written += os.pwrite(self.fd, lines[written:], self.end + written)
            if sync:
                os.fsync(self.fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.end)
            raise
        self.end += written
        self._before_next = b""

    def empty(self) -> None:
        """Start again at the beginning."""
        os.ftruncate(self.fd, 0)
        self.end = 0

    def remove(self) -> None:
        """Delete the file, or put it aside for a person to look at if it has damaged lines; let go of it."""
        try:
            if self._damaged:
                self.path.rename(_aside(self.path))
            else:
                self.path.unlink()
        finally:
            os.close(self.fd)

    def load(self) -> list[JournalEntry]:
        """The file's entries that are not done. Raises OSError."""
        data = self.path.read_bytes()
        self.end = len(data)
        *lines, torn = data.split(b"\n")
        if torn:
            self._before_next = b"\n"
            self._report(len(lines) + 1)
        entries: dict[str, JournalEntry] = {}
        for number, line in enumerate(lines, 1):
            try:
                value = _parse(line)
            except (ValueError, TypeError):
                self._report(number)
                continue
            if isinstance(value, JournalEntry):
                entries.setdefault(value.reservation, value)
            else:
                entries.pop(value, None)
        return list(entries.values())

    def _report(self, line: int) -> None:
        self._damaged = True
        log.error("%s, line %d: torn or corrupt, skipped; the file is kept as %s", self.path, line, _aside(self.path))


def _line(value: dict[str, object]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> JournalEntry | str:
    """An entry, or the reservation that is done. Raises ValueError, TypeError."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("the checksum is another")
    value = json.loads(text)
    return str(value["done"]) if "done" in value else JournalEntry(**value)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


def _open_locked(path: Path, flags: int = 0) -> int | None:
    """A descriptor of path that holds its lock; None if another process has the lock or has removed the file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, _FILE_MODE)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = path.stat().st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except BaseException:
        os.close(fd)
        raise
    if not mine:
        os.close(fd)
        return None
    return fd


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
