"""The archive in PostgreSQL. Its driver is an extra of the package: only who needs it imports this."""

import os
import socket
from collections.abc import Sequence
from functools import partial

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict

from gateway.credits.archive_database import CONNECT_TIMEOUT_S, Connection
from gateway.credits.archive_rows import COLUMNS, INTEGERS, Row

#: No statement here takes more than milliseconds on a database that works.
_STATEMENT_TIMEOUT_S = 10
#: Any number, as long as every gateway has the same.
_ADVISORY_LOCK = 0x71675F6C


def _insert_entries() -> str:
    values = (f"(entry->>{at})" + "::bigint" * (name in INTEGERS) for at, name in enumerate(COLUMNS))
    return (
        f"INSERT INTO ledger_entries ({', '.join(COLUMNS)}) SELECT {', '.join(values)} "  # noqa: S608
        "FROM json_array_elements(%s::json) AS entry ON CONFLICT DO NOTHING"
    )


_INSERT_ENTRIES = _insert_entries()


class _Connection(Connection):
    def insert_entries(self, rows: Sequence[Row]) -> int:
        """All in one value, which the server takes apart: 1 µs for each entry, where a statement for each takes 11."""
        inserted: int = self._raw.execute(_INSERT_ENTRIES, (orjson.dumps(rows).decode(),)).rowcount
        return inserted


class Postgresql:
    """A ``Database`` of a PostgreSQL server."""

    errors: tuple[type[Exception], ...] = (psycopg.Error, OSError)
    in_order_of_key = ""

    def __init__(self, url: str) -> None:
        """url: postgresql://… Raises ValueError, whose text holds no password, where the driver cannot read it."""
        try:
            conninfo_to_dict(url)
        except psycopg.Error:
            # The driver's own text repeats the URL, password and all.
            raise ValueError("archive.url is not a PostgreSQL URL: postgresql://USER:PASSWORD@HOST/DATABASE") from None
        self._url = url

    def connect(self, *, create: bool) -> Connection | None:
        """A connection as it comes. create: makes no difference, a database is made by the server's operator."""
        raw = psycopg.connect(self._url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
        return _Connection(raw, placeholder="%s", begin="BEGIN", abort=partial(_hang_up, raw))

    def prepare(self, connection: Connection) -> None:
        """Limit what a statement may take, and have every commit on the server's disk."""
        connection.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT_S}s'")
        connection.execute("SET client_min_messages = warning")
        if connection.execute("SHOW synchronous_commit").fetchone()[0] == "off":
            connection.execute("SET synchronous_commit = on")  # what it acknowledges is trimmed from the store

    def has_tables(self, connection: Connection) -> bool:
        """Whether the archive was ever made."""
        return connection.execute("SELECT to_regclass('archive_meta')").fetchone()[0] is not None

    def begin_alone(self, connection: Connection) -> None:
        """Open a transaction, and hold the lock of those who do so until its end."""
        connection.begin()
        connection.execute("SELECT pg_advisory_xact_lock(?)", _ADVISORY_LOCK)


def _hang_up(raw: psycopg.Connection[tuple[object, ...]]) -> None:
    # Shutting the socket down ends a wait in another thread; closing it would not, and frees its number for others.
    with socket.socket(fileno=os.dup(raw.fileno())) as wire:
        wire.shutdown(socket.SHUT_RDWR)
