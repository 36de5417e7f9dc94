"""The archive in a SQLite file."""

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gateway.credits.archive_database import CONNECT_TIMEOUT_S, Connection
from gateway.credits.archive_rows import COLUMNS, Row

#: Rows of a statement. Before and after each, Python's lock is let go and taken again, which the event loop may have to
#: wait for: 10 times for 250 entries, not 250 times, and each time for less than 0.1 ms.
_INSERT_AT_ONCE = 25


@lru_cache(maxsize=_INSERT_AT_ONCE)
def _insert_entries(rows: int) -> str:
    row = f"({', '.join('?' * len(COLUMNS))})"
    return (
        f"INSERT INTO ledger_entries ({', '.join(COLUMNS)}) VALUES {', '.join([row] * rows)} "  # noqa: S608
        "ON CONFLICT DO NOTHING"
    )


class _Connection(Connection):
    def insert_entries(self, rows: Sequence[Row]) -> int:
        inserted = 0
        for first in range(0, len(rows), _INSERT_AT_ONCE):
            piece = rows[first : first + _INSERT_AT_ONCE]
            values: list[Any] = []
            for row in piece:
                values += row
            inserted += self._raw.execute(_insert_entries(len(piece)), values).rowcount
        return inserted


class Sqlite:
    """A ``Database`` in a file, which several processes may have open."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    in_order_of_key = " WITHOUT ROWID"

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
        return _Connection(raw, placeholder="?", begin="BEGIN IMMEDIATE", abort=raw.interrupt)

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
