"""The archive: the ledger's entries in SQL, in SQLite or PostgreSQL, for good.

Everything here that touches a database runs in one thread of the archive's own: a slow disk or a distant server must
not hold up the gateway's event loop, and a connection has one user at a time.

ledger_entries     one row per entry, the columns of ``ledger.Entry``; mappings as JSON text
ledger_conflicts   entries that are not there: not readable, or another entry has their place. Never empty them
                   unread: each is a movement of credits that the ledger does not agree about, or that the store has
                   lost: a replica that became the primary without it has given its number to another
archive_meta       id: which archive this is, for ever; version: of these tables
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import socket
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from gateway.credits.errors import EngineError
from gateway.credits.ledger import BrokenEntry, Entry

log = logging.getLogger(__name__)

VERSION = "1"
#: No statement here takes more than milliseconds on a database that works.
_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_S = 10
#: A server that hangs does not even end its statements: how long a call waits, and the last one.
_ANSWER_S = 20.0
_CLOSE_S = 5.0
#: Keeps gateways that start at once from making the tables at once.
_ADVISORY_LOCK = 0x71675F6C
_MOST_CONFLICTS_SHOWN = 100

_TABLES = (
    """CREATE TABLE IF NOT EXISTS archive_meta (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS ledger_entries (
        shard INTEGER NOT NULL, stream_id TEXT NOT NULL, account TEXT NOT NULL, sequence BIGINT NOT NULL,
        kind TEXT NOT NULL, id TEXT NOT NULL, time_ms BIGINT NOT NULL, postings TEXT NOT NULL,
        used_after TEXT NOT NULL, balance_after_nano BIGINT NOT NULL, plan TEXT NOT NULL, model TEXT NOT NULL,
        key TEXT NOT NULL, price_version TEXT NOT NULL, source TEXT NOT NULL, tokens TEXT NOT NULL,
        reason TEXT NOT NULL, extra TEXT NOT NULL,
        PRIMARY KEY (shard, stream_id), UNIQUE (account, sequence))""",
    """CREATE TABLE IF NOT EXISTS ledger_conflicts (
        shard INTEGER NOT NULL, stream_id TEXT NOT NULL, digest TEXT NOT NULL, account TEXT NOT NULL,
        reason TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (shard, stream_id, digest))""",
    """CREATE INDEX IF NOT EXISTS ledger_conflicts_account ON ledger_conflicts (account)""",
)

_NAMES = tuple(column.name for column in fields(Entry))
_COLUMNS = ", ".join(_NAMES)
_INSERT = f"INSERT INTO ledger_entries ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))}) ON CONFLICT DO NOTHING"  # noqa: S608
_SELECT = f"SELECT {_COLUMNS} FROM ledger_entries"  # noqa: S608

#: The reason of a conflict that a failover explains.
_LOST = "lost by the store in a failover: "

T = TypeVar("T")


class ArchiveError(EngineError):
    """The archive cannot be used, or cannot be reached; the text is for people and holds no password."""


@dataclass(frozen=True, slots=True)
class Period:
    """A span of the store's time: since_ms ≤ time < until_ms, milliseconds since 1970."""

    since_ms: int = 0
    until_ms: int = 10**17

    def has(self, entry: Entry) -> bool:
        """Whether the entry is of this time."""
        return self.since_ms <= entry.time_ms < self.until_ms


class _Cursor(Protocol):
    rowcount: int

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class _Connection:
    """The part of DB-API that is needed, without transactions of its own; ``?`` stands for a value."""

    def __init__(self, raw: Any, placeholder: str, begin: str) -> None:
        self._raw = raw
        self._placeholder = placeholder
        self._begin = begin

    def abort(self) -> None:
        """End the statement that another thread waits for, and with it the connection."""
        with suppress(Exception):  # it may just have ended by itself
            if isinstance(self._raw, sqlite3.Connection):
                self._raw.interrupt()
            else:
                with socket.socket(fileno=os.dup(self._raw.fileno())) as wire:
                    wire.shutdown(socket.SHUT_RDWR)

    def execute(self, statement: str, *values: object) -> _Cursor:
        """One statement."""
        cursor: _Cursor = self._raw.execute(statement.replace("?", self._placeholder), values)
        return cursor

    def insert_many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> int:
        """One statement for each row; how many rows were inserted."""
        cursor = self._raw.cursor()
        try:
            cursor.executemany(statement.replace("?", self._placeholder), rows)
            inserted: int = cursor.rowcount
        finally:
            cursor.close()
        return inserted

    def begin(self) -> None:
        """Open a transaction; ending the connection undoes it."""
        self.execute(self._begin)

    def commit(self) -> None:
        """Make it durable."""
        self.execute("COMMIT")

    def close(self) -> None:
        """End the connection."""
        self._raw.close()


class _Database(Protocol):
    errors: tuple[type[Exception], ...]

    def connect(self, *, create: bool) -> _Connection | None:
        """A connection to a database with our tables; None if it has none and they are not to be made."""


class _Sqlite:
    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, file: Path) -> None:
        self._file = file

    def connect(self, *, create: bool) -> _Connection | None:
        if not create and not self._file.exists():
            return None
        if create:  # like the embedded store's own files, for no other eyes
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
        raw = sqlite3.connect(self._file, timeout=_CONNECT_TIMEOUT_S, isolation_level=None)
        try:
            raw.execute("PRAGMA journal_mode = WAL")
            raw.execute("PRAGMA synchronous = FULL")
            connection = _Connection(raw, "?", "BEGIN IMMEDIATE")
            if create:
                _make_tables(connection)
            elif not raw.execute("SELECT 1 FROM sqlite_master WHERE name = 'archive_meta'").fetchone():
                raw.close()
                return None
        except BaseException:
            raw.close()
            raise
        return connection


class _Postgresql:
    def __init__(self, url: str) -> None:
        try:
            import psycopg  # noqa: PLC0415
        except ImportError as error:
            raise ArchiveError(
                "archive.url names PostgreSQL, whose driver is not installed: pip install 'quota-gateway[postgresql]'"
            ) from error
        self._psycopg = psycopg
        self.errors: tuple[type[Exception], ...] = (psycopg.Error, OSError)
        try:
            psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.Error:
            # The driver's own text repeats the URL, password and all.
            raise ArchiveError(
                "archive.url is not a PostgreSQL URL: postgresql://USER:PASSWORD@HOST/DATABASE"
            ) from None
        self._url = url

    def connect(self, *, create: bool) -> _Connection | None:
        raw: Any = self._psycopg.connect(self._url, autocommit=True, connect_timeout=_CONNECT_TIMEOUT_S)
        try:
            connection = _Connection(raw, "%s", "BEGIN")
            raw.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT_S}s'")
            raw.execute("SET client_min_messages = warning")
            if raw.execute("SHOW synchronous_commit").fetchone()[0] == "off":
                raw.execute("SET synchronous_commit = on")  # what it acknowledges is trimmed from the store
            if create:
                _make_tables(connection, "SELECT pg_advisory_xact_lock(?)", _ADVISORY_LOCK)
            elif raw.execute("SELECT to_regclass('archive_meta')").fetchone()[0] is None:
                raw.close()
                return None
        except BaseException:
            raw.close()
            raise
        return connection


def _make_tables(connection: _Connection, *lock: str | int) -> None:
    connection.begin()
    if lock:
        connection.execute(str(lock[0]), *lock[1:])
    for statement in _TABLES:
        connection.execute(statement)
    insert = "INSERT INTO archive_meta (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING"
    connection.execute(insert, "version", VERSION)
    connection.execute(insert, "id", secrets.token_hex(12))
    connection.commit()


def _database(url: str, data_dir: Path) -> _Database:
    if url == "sqlite":
        return _Sqlite(data_dir / "ledger.sqlite3")
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        return _Sqlite(Path(unquote(rest)))
    if scheme == "postgresql":
        return _Postgresql(url)
    raise ArchiveError("archive.url is sqlite, sqlite:///absolute/path or a postgresql:// URL")


class Archive:
    """The archive at a URL. Reading one that was never made gives nothing; ``open`` makes it.

    All calls raise ArchiveError when the database cannot be had; the next call tries again on a new connection.
    """

    def __init__(self, url: str, data_dir: Path) -> None:
        """url: ``sqlite`` (ledger.sqlite3 in data_dir), sqlite:///absolute/path or postgresql://… Connects to nothing
        yet. Raises ArchiveError for another URL, or where PostgreSQL's driver is not installed."""
        self._database = _database(url, data_dir)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-archive")
        self._connection: _Connection | None = None
        self._id: str | None = None

    async def open(self) -> str:
        """Make the archive unless it is there; its id."""
        found = await self._run(lambda _: self._id, create=True)
        assert found is not None
        return found

    async def of_store(self, store_id: str) -> str:
        """The id of the store whose ledger this is: the first that asked."""

        def first(connection: _Connection | None) -> str:
            present = _present(connection)
            present.begin()
            present.execute(
                "INSERT INTO archive_meta (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING", "store", store_id
            )
            row = present.execute("SELECT value FROM archive_meta WHERE name = ?", "store").fetchone()
            present.commit()
            return str(row[0])

        return await self._run(first, create=True)

    async def find(self) -> str | None:
        """Its id, or None if it was never made."""
        return await self._run(lambda connection: self._id if connection else None)

    async def close(self) -> None:
        """End the connection and the thread, once the statement that runs has ended."""
        with suppress(ArchiveError):
            await self._within(_CLOSE_S, asyncio.get_running_loop().run_in_executor(self._thread, self._drop))
        self._thread.shutdown(wait=False)

    async def append(self, entries: Sequence[Entry], broken: Sequence[BrokenEntry]) -> int:
        """Put entries in, all or none, and durably; how many were new. What cannot go in beside what is there already
        goes into ledger_conflicts, like broken entries."""
        return await self._run(lambda connection: _append(_present(connection), entries, broken), create=True)

    async def entries(self, account: str, after: int, upto: int, period: Period, limit: int) -> list[Entry]:
        """The account's first entries with after < sequence ≤ upto in the period, limit at most, in order."""
        statement = (
            f"{_SELECT} WHERE account = ? AND sequence > ? AND sequence <= ? AND time_ms >= ? AND time_ms < ? "
            "ORDER BY sequence LIMIT ?"
        )
        values = (account, after, upto, period.since_ms, period.until_ms, limit)
        return await self._run(
            lambda connection: (
                [_entry(row) for row in connection.execute(statement, *values).fetchall()] if connection else []
            )
        )

    async def last_sequences(self, account: str | None = None) -> dict[str, int]:
        """The number of the latest entry of every account that has one, or of one account."""
        return await self._run(lambda connection: _last_sequences(connection, account) if connection else {})

    async def conflicts(self, account: str | None = None) -> list[tuple[str, str]]:
        """The (account, reason) of what ledger_conflicts holds that nothing explains, of one account or all; the first
        100."""
        return await self._reasons(account, "NOT LIKE")

    async def lost(self, account: str | None = None) -> list[tuple[str, str]]:
        """The same of entries that the store lost in a failover and whose numbers it gave to others."""
        return await self._reasons(account, "LIKE")

    async def _reasons(self, account: str | None, like: str) -> list[tuple[str, str]]:
        where = f"WHERE reason {like} ?" + ("" if account is None else " AND account = ?")
        statement = f"SELECT account, reason FROM ledger_conflicts {where} ORDER BY shard, stream_id LIMIT ?"  # noqa: S608
        values = (f"{_LOST}%", *(() if account is None else (account,)), _MOST_CONFLICTS_SHOWN)
        return await self._run(
            lambda connection: (
                [(row[0], row[1]) for row in connection.execute(statement, *values).fetchall()] if connection else []
            )
        )

    async def _run(self, work: Callable[[_Connection | None], T], *, create: bool = False) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._work, work, create)
        return await self._within(_ANSWER_S, future)

    async def _within(self, seconds: float, future: "asyncio.Future[T]") -> T:
        """The future's result; a database that does not answer in time is left, which ends the thread's wait too."""
        future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(future)
        except TimeoutError:
            if self._connection is not None:
                self._connection.abort()
            raise ArchiveError("the ledger's archive does not answer") from None

    def _work(self, work: Callable[[_Connection | None], T], create: bool) -> T:
        try:
            if self._connection is None:
                self._connect(create)
            return work(self._connection)
        except self._database.errors as error:
            self._drop()
            raise ArchiveError(f"the ledger's archive: {str(error).strip() or type(error).__name__}") from error
        except BaseException:
            self._drop()
            raise

    def _connect(self, create: bool) -> None:
        connection = self._connection = self._database.connect(create=create)
        if connection is None:
            return
        meta = dict(connection.execute("SELECT name, value FROM archive_meta").fetchall())
        if meta.get("version") != VERSION or "id" not in meta:
            raise ArchiveError(
                f"the ledger's archive has tables of version {meta.get('version')}; this gateway knows {VERSION}"
            )
        self._id = meta["id"]

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _present(connection: _Connection | None) -> _Connection:
    assert connection is not None
    return connection


def _row(entry: Entry) -> tuple[object, ...]:
    return tuple(json.dumps(value) if isinstance(value, dict) else value for value in astuple(entry))


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_NAMES, row, strict=True))
    for name in ("postings", "used_after", "tokens", "extra"):
        values[name] = json.loads(values[name])
    values["used_after"] = {int(refresh_ms): nano for refresh_ms, nano in values["used_after"].items()}
    return Entry(**values)


def _append(connection: _Connection, entries: Sequence[Entry], broken: Sequence[BrokenEntry]) -> int:
    connection.begin()
    new = connection.insert_many(_INSERT, [_row(entry) for entry in entries]) if entries else 0
    conflicts = [(one.shard, one.stream_id, one.account, str(one), one.content) for one in broken]
    if new != len(entries):
        for entry in entries:
            if lost := _without_place(connection, entry):
                conflicts.append(
                    (lost.shard, lost.stream_id, lost.account, _LOST + _name(lost), json.dumps(_row(lost)))
                )
                new += connection.insert_many(_INSERT, [_row(entry)])
            elif reason := _refusal(connection, entry):
                conflicts.append((entry.shard, entry.stream_id, entry.account, reason, json.dumps(_row(entry))))
    for shard, stream_id, account, reason, content in conflicts:
        recorded = connection.execute(
            "INSERT INTO ledger_conflicts (shard, stream_id, digest, account, reason, content) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            *(shard, stream_id, hashlib.sha256(content.encode()).hexdigest(), account, reason, content),
        )
        if recorded.rowcount:
            log.error("%s; it is kept in the archive's table ledger_conflicts", reason)
    connection.commit()
    return new


def _name(entry: Entry) -> str:
    return f"ledger entry {entry.sequence} of account {entry.account} (stream {entry.shard:02x}, {entry.stream_id})"


def _place(entry: Entry) -> tuple[int, ...]:
    return tuple(map(int, entry.stream_id.split("-")))


def _without_place(connection: _Connection, entry: Entry) -> Entry | None:
    """Take away the entry that has a later one's number, if one has: the store is right about what it has now."""
    row = connection.execute(f"{_SELECT} WHERE account = ? AND sequence = ?", entry.account, entry.sequence).fetchone()
    # Not the other way round, for an archiver that read its entry just before the failover.
    if row is None or _place(found := _entry(row)) >= _place(entry):
        return None
    connection.execute("DELETE FROM ledger_entries WHERE account = ? AND sequence = ?", entry.account, entry.sequence)
    return found


def _refusal(connection: _Connection, entry: Entry) -> str | None:
    """Why an entry did not go in; None if it is there."""
    row = connection.execute(f"{_SELECT} WHERE shard = ? AND stream_id = ?", entry.shard, entry.stream_id).fetchone()
    if row is not None and _entry(row) == entry:
        return None
    return f"{_name(entry)} is not the one that the archive has from this place of the stream"


def _last_sequences(connection: _Connection, account: str | None) -> dict[str, int]:
    # From name to name along the index: there are many more entries than accounts.
    last = "SELECT max(sequence) FROM ledger_entries WHERE account = ?"
    if account is not None:
        found = connection.execute(last, account).fetchone()[0]
        return {} if found is None else {account: found}
    sequences: dict[str, int] = {}
    name = ""
    while name := connection.execute("SELECT min(account) FROM ledger_entries WHERE account > ?", name).fetchone()[0]:
        sequences[name] = connection.execute(last, name).fetchone()[0]
    return sequences
