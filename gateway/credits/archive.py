"""The archive: the ledger's entries in SQL, in SQLite or PostgreSQL, for good.

Everything here that touches a database runs in one thread of the archive's own: a slow disk or a distant server must
not hold up the gateway's event loop, and a connection has one user at a time.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from gateway.credits.archive_database import VERSION, Connection, Database, connect
from gateway.credits.archive_rows import COLUMNS, Row, entry_of, row_of
from gateway.credits.archive_sqlite import Sqlite
from gateway.credits.errors import EngineError
from gateway.credits.ledger import BrokenEntry, Entry

log = logging.getLogger(__name__)

#: A server that hangs does not even end its statements: how long a call waits, and the last one.
_ANSWER_S = 20.0
_CLOSE_S = 5.0
_MOST_CONFLICTS_SHOWN = 100

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM ledger_entries"  # noqa: S608

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


def _database(url: str, data_dir: Path) -> Database:
    if url == "sqlite":
        return Sqlite(data_dir / "ledger.sqlite3")
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        return Sqlite(Path(unquote(rest)))
    if scheme == "postgresql":
        return _postgresql(url)
    raise ArchiveError("archive.url is sqlite, sqlite:///absolute/path or a postgresql:// URL")


def _postgresql(url: str) -> Database:
    try:
        from gateway.credits.archive_postgresql import Postgresql  # noqa: PLC0415
    except ImportError as error:
        raise ArchiveError(
            "archive.url names PostgreSQL, whose driver is not installed: pip install 'quota-gateway[postgresql]'"
        ) from error
    try:
        return Postgresql(url)
    except ValueError as error:
        raise ArchiveError(str(error)) from None


class Archive:
    """The archive at a URL. Reading one that was never made gives nothing; ``open`` makes it.

    All calls raise ArchiveError when the database cannot be had; the next call tries again on a new connection.
    """

    def __init__(self, url: str, data_dir: Path) -> None:
        """url: ``sqlite`` (ledger.sqlite3 in data_dir), sqlite:///absolute/path or postgresql://… Connects to nothing
        yet. Raises ArchiveError for another URL, or where PostgreSQL's driver is not installed."""
        self._database = _database(url, data_dir)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-archive")
        self._connection: Connection | None = None
        self._id: str | None = None

    async def open(self) -> str:
        """Make the archive unless it is there; its id."""
        found = await self._run(lambda _: self._id, create=True)
        assert found is not None
        return found

    async def of_store(self, store_id: str) -> str:
        """The id of the store whose ledger this is: the first that asked."""

        def first(connection: Connection | None) -> str:
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

    async def append(self, rows: Sequence[Row], broken: Sequence[BrokenEntry]) -> int:
        """Put entries in, all or none, and durably; how many were new. What cannot go in beside what is there already
        goes into ledger_conflicts, like broken entries."""
        return await self._run(lambda connection: _append(_present(connection), rows, broken), create=True)

    async def entries(self, account: str, after: int, upto: int, period: Period, limit: int) -> list[Entry]:
        """The account's first entries with after < sequence ≤ upto in the period, limit at most, in order."""
        statement = (
            f"{_SELECT} WHERE account = ? AND sequence > ? AND sequence <= ? AND time_ms >= ? AND time_ms < ? "
            "ORDER BY sequence LIMIT ?"
        )
        values = (account, after, upto, period.since_ms, period.until_ms, limit)
        return await self._run(
            lambda connection: (
                [entry_of(row) for row in connection.execute(statement, *values).fetchall()] if connection else []
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

    async def _run(self, work: Callable[[Connection | None], T], *, create: bool = False) -> T:
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

    def _work(self, work: Callable[[Connection | None], T], create: bool) -> T:
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
        connection = self._connection = connect(self._database, create=create)
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


def _present(connection: Connection | None) -> Connection:
    assert connection is not None
    return connection


def _append(connection: Connection, rows: Sequence[Row], broken: Sequence[BrokenEntry]) -> int:
    connection.begin()
    new = connection.insert_entries(rows) if rows else 0
    conflicts = [(one.shard, one.stream_id, one.account, str(one), one.content) for one in broken]
    if new != len(rows):
        for entry in map(entry_of, rows):
            there = _with_number_of(entry, connection)
            if there == entry:
                continue
            # The store is right about what it has now. Not the other way round, for an archiver that read its entry
            # just before the failover.
            if there is not None and _place(there) < _place(entry):
                conflicts.append(_conflict(there, _LOST + _name(there)))
                _remove(there, connection)
                if connection.insert_entries([row_of(entry)]):
                    new += 1
                    continue
            conflicts.append(_conflict(entry, f"{_name(entry)} is not the one that the archive has"))
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


def _with_number_of(entry: Entry, connection: Connection) -> Entry | None:
    row = connection.execute(f"{_SELECT} WHERE account = ? AND sequence = ?", entry.account, entry.sequence).fetchone()
    return None if row is None else entry_of(row)


def _remove(entry: Entry, connection: Connection) -> None:
    connection.execute("DELETE FROM ledger_entries WHERE account = ? AND sequence = ?", entry.account, entry.sequence)


def _conflict(entry: Entry, reason: str) -> tuple[int, str, str, str, str]:
    return entry.shard, entry.stream_id, entry.account, reason, json.dumps(row_of(entry))


def _last_sequences(connection: Connection, account: str | None) -> dict[str, int]:
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
