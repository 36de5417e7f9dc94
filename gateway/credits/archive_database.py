"""What the archive asks of a database, whichever it is, and the archive's tables.

ledger_entries     one row per entry, the columns of ``ledger.Entry``; mappings as JSON text. Earlier versions
                   made it with another key, (shard, stream_id), beside: such a table takes the same rows
ledger_conflicts   entries that are not there: not readable, or another entry has their place. Never empty them
                   unread: each is a movement of credits that the ledger does not agree about, or that the store has
                   lost: a replica that became the primary without it has given its number to another
archive_meta       id: which archive this is, for ever; version: of these tables
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from gateway.credits.archive_rows import Row

VERSION = "1"
CONNECT_TIMEOUT_S = 5

_TABLES = (
    """CREATE TABLE IF NOT EXISTS archive_meta (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS ledger_entries (
        shard INTEGER NOT NULL, stream_id TEXT NOT NULL, account TEXT NOT NULL, sequence BIGINT NOT NULL,
        kind TEXT NOT NULL, id TEXT NOT NULL, time_ms BIGINT NOT NULL, postings TEXT NOT NULL,
        used_after TEXT NOT NULL, balance_after_nano BIGINT NOT NULL, plan TEXT NOT NULL, model TEXT NOT NULL,
        key TEXT NOT NULL, price_version TEXT NOT NULL, source TEXT NOT NULL, tokens TEXT NOT NULL,
        reason TEXT NOT NULL, extra TEXT NOT NULL, PRIMARY KEY (account, sequence)){in_order_of_key}""",
    """CREATE TABLE IF NOT EXISTS ledger_conflicts (
        shard INTEGER NOT NULL, stream_id TEXT NOT NULL, digest TEXT NOT NULL, account TEXT NOT NULL,
        reason TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (shard, stream_id, digest))""",
    """CREATE INDEX IF NOT EXISTS ledger_conflicts_account ON ledger_conflicts (account)""",
)


class Cursor(Protocol):
    """What a statement gave. rowcount: how many rows it changed."""

    rowcount: int

    def fetchone(self) -> Any:
        """The next row, None after the last."""

    def fetchall(self) -> list[Any]:
        """All rows that are left."""


class Connection(ABC):
    """The part of DB-API that is needed, without transactions of its own; ``?`` stands for a value. All but ``abort``
    raise the errors of the database."""

    def __init__(self, raw: Any, *, placeholder: str, begin: str, abort: Callable[[], object]) -> None:
        """raw: the driver's connection, which begins no transaction by itself. begin: the statement that does. abort:
        ends, from another thread, the statement that raw waits for; it may raise."""
        self._raw = raw
        self._placeholder = placeholder
        self._begin = begin
        self._abort = abort

    def abort(self) -> None:
        """End the statement that another thread waits for, and with it the connection."""
        with suppress(Exception):  # it may just have ended by itself
            self._abort()

    def execute(self, statement: str, *values: object) -> Cursor:
        """One statement."""
        cursor: Cursor = self._raw.execute(statement.replace("?", self._placeholder), values)
        return cursor

    @abstractmethod
    def insert_entries(self, rows: Sequence[Row]) -> int:
        """Put entries in whose number no other of their account has; how many went in."""

    def begin(self) -> None:
        """Open a transaction; ending the connection undoes it."""
        self.execute(self._begin)

    def commit(self) -> None:
        """Make it durable."""
        self.execute("COMMIT")

    def close(self) -> None:
        """End the connection."""
        self._raw.close()


class Database(Protocol):
    """A database that may hold the archive. All raise ``errors``."""

    errors: tuple[type[Exception], ...]
    #: What ends the definition of a table whose rows lie in the order of its key, where a database knows such tables.
    in_order_of_key: str

    def connect(self, *, create: bool) -> Connection | None:
        """A connection as it comes; None where there is no database and none is to be made."""

    def prepare(self, connection: Connection) -> None:
        """Set it up: what it commits from now on is durable."""

    def has_tables(self, connection: Connection) -> bool:
        """Whether the archive was ever made."""

    def begin_alone(self, connection: Connection) -> None:
        """Open a transaction that waits for every other one that was opened so."""


def connect(database: Database, *, create: bool) -> Connection | None:
    """A connection to a database with the archive's tables; None if it has none and they are not to be made. Raises
    the database's errors."""
    connection = database.connect(create=create)
    if connection is None:
        return None
    try:
        # One that is only looked for may turn out to be somebody else's, who must find it as it was.
        if not create and not database.has_tables(connection):
            connection.close()
            return None
        database.prepare(connection)
        if create:
            _make_tables(database, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(database: Database, connection: Connection) -> None:
    # Gateways that start at once would make them at once.
    database.begin_alone(connection)
    for statement in _TABLES:
        connection.execute(statement.format(in_order_of_key=database.in_order_of_key))
    insert = "INSERT INTO archive_meta (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING"
    connection.execute(insert, "version", VERSION)
    connection.execute(insert, "id", secrets.token_hex(12))
    connection.commit()
