"""The archive in a SQLite file."""

import sqlite3
from pathlib import Path

from gateway.credits.archive_database import CONNECT_TIMEOUT_S, Connection


class Sqlite:
    """A ``Database`` in a file, which several processes may have open."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, file: Path) -> None:
        self._file = file

    def connect(self, *, create: bool) -> Connection | None:
        """A connection as it comes; None where there is no file and none is to be made."""
        if not create and not self._file.exists():
            return None
        if create:  # like the embedded store's own files, for no other eyes
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
        raw = sqlite3.connect(self._file, timeout=CONNECT_TIMEOUT_S, isolation_level=None)
        return Connection(raw, placeholder="?", begin="BEGIN IMMEDIATE", abort=raw.interrupt)

    def prepare(self, connection: Connection) -> None:
        """Let readers and a writer work side by side, and have every commit on the disk."""
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    def has_tables(self, connection: Connection) -> bool:
        """Whether the archive was ever made."""
        return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'archive_meta'").fetchone() is not None

    def begin_alone(self, connection: Connection) -> None:
        """Open a transaction; SQLite has one writer at a time."""
        connection.begin()
