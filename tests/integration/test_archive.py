"""The ledger's way from the store's streams into the archive, on both databases and a real store."""

import asyncio
import json
import os
import secrets
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.credits import archive as archive_module
from gateway.credits import archiver as archiver_module
from gateway.credits.archive import Archive, ArchiveError, Period
from gateway.credits.archive_rows import ordinary_row, row_of
from gateway.credits.archiver import Archiver, ForeignArchive, archiving
from gateway.credits.auditor import Auditor
from gateway.credits.connection import Command
from gateway.credits.errors import StoreRefused, StoreUnavailable
from gateway.credits.keyspace import account_key, shard_keys, shard_of
from gateway.credits.ledger import Entry, parse_entry
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.benchmarks.growth import PLAN, PLANS, request_on
from tests.conftest import START_MS, TimedServer
from tests.postgresql import postgresql_cluster

EVER = Period()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with postgresql_cluster() as socket:
        yield socket


def new_database(socket: str) -> str:
    """The URL of a database that does not exist yet."""
    return f"postgresql://postgres@/ledger_{secrets.token_hex(6)}?host={socket}"


def make_database(url: str) -> None:
    name = url.partition("@/")[2].partition("?")[0]
    with closing(psycopg.connect(url.replace(name, "postgres"), autocommit=True)) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/ledger.sqlite3"
    url = new_database(request.getfixturevalue("cluster"))
    make_database(url)
    return url


@asynccontextmanager
async def archive_at(url: str) -> AsyncIterator[Archive]:
    archive = Archive(url, Path("unused"))
    try:
        yield archive
    finally:
        await archive.close()


@pytest.fixture
async def archive(url: str) -> AsyncIterator[Archive]:
    async with archive_at(url) as archive:
        yield archive


@pytest.fixture
def archiver(store: Store, archive: Archive, metrics: Metrics) -> Archiver:
    return Archiver(store, archive, metrics)


def sql(url: str, statement: str) -> list[Any]:
    """Run a statement as someone with the database's own tools would."""
    if url.startswith("sqlite://"):
        with closing(sqlite3.connect(url.removeprefix("sqlite://"), isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


async def write(store: Store, account: str, first: int, last: int, **more: str) -> None:
    """Entries of an account as the scripts write them: each grants a nano-credit."""
    stream = shard_keys(shard_of(account)).ledger
    for sequence in range(first, last + 1):
        fields = {
            "account": account,
            "sequence": str(sequence),
            "kind": "grant",
            "id": f"op-{sequence}",
            "time": str(START_MS + sequence),
            "postings": "bought -1 balance 1",
            "used_after": "",
            "balance_after": str(sequence),
            "note": json.dumps({"reason": "thanks – ☃"}),
            **more,
        }
        await store.call("XADD", stream, "*", *(word for pair in fields.items() for word in pair))
    # What the account says of its ledger: readers go no farther.
    await store.call("HSET", account_key(account), "sequence", last)


async def left_in_store(store: Store, *accounts: str) -> int:
    return sum([await store.call("XLEN", shard_keys(shard_of(account)).ledger) for account in accounts])


async def archived(archive: Archive, account: str) -> list[Entry]:
    return await archive.entries(account, 0, 10**9, EVER, 10_000)


def counted(metrics: Metrics, name: str) -> float:
    families = text_string_to_metric_families(metrics.expose(None)[0].decode())
    return next(sample.value for family in families for sample in family.samples if sample.name == name)


async def test_entries_move_from_the_streams_into_the_archive(
    store: Store, archive: Archive, archiver: Archiver, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver_module, "READ_AT_ONCE", 20)
    monkeypatch.setattr(archiver_module, "TRANSACTION", 70)
    await asyncio.gather(*(write(store, f"a{number}", 1, 50) for number in range(20)))

    await archiver.sweep()

    for number in range(20):
        entries = await archived(archive, f"a{number}")
        assert [one.sequence for one in entries] == list(range(1, 51))
        assert entries[2].postings == {"bought": -1, "balance": 1}
        assert (entries[2].id, entries[2].reason, entries[2].time_ms) == ("op-3", "thanks – ☃", START_MS + 3)
    assert await left_in_store(store, *(f"a{number}" for number in range(20))) == 0
    assert counted(metrics, "quota_gateway_ledger_archived_total") == 1000
    assert await archive.last_sequences() == {f"a{number}": 50 for number in range(20)}
    assert not await archive.conflicts()


async def test_what_a_request_leaves_is_read_the_short_way(store: Store) -> None:
    await Operator(store, PLANS, PLAN.name).create_account("alice")
    await request_on([store], ["alice"], 0, 3)
    shard = shard_of("alice")
    entries = await store.call("XRANGE", shard_keys(shard).ledger, "-", "+")
    settled = [(stream_id, words) for stream_id, words in entries if b"settle" in words]
    assert [ordinary_row(shard, *one) for one in settled] == [row_of(parse_entry(shard, *one)) for one in settled]
    assert len(settled) == 3


class Interrupted(Store):
    """A store that does something else before a command."""

    def __init__(self, store: Store, command: str, before: Callable[[], Awaitable[None]]) -> None:
        self._store, self._command, self._before = store, command, before

    async def call(self, *command: str | bytes | int) -> Any:
        if command[0] == self._command:
            await self._before()
        return await self._store.call(*command)

    async def call_all(self, commands: Sequence[Command]) -> list[Any]:
        return [await self.call(*command) for command in commands]

    async def scan(self, pattern: str) -> list[str]:
        return await self._store.scan(pattern)


class Watched(Interrupted):
    """A store that notes what is read from it and what is trimmed, all that is asked at once as one step."""

    def __init__(self, store: Store, steps: list[str]) -> None:
        self._store, self._steps = store, steps

    async def call(self, *command: str | bytes | int) -> Any:
        return await self._store.call(*command)

    async def call_all(self, commands: Sequence[Command]) -> list[Any]:
        name = str(commands[0][0])
        if name != "XLEN":
            self._steps.append(name)
        return await self._store.call_all(commands)


@pytest.mark.parametrize(
    ("quiet", "expected"),
    [
        (False, ["XRANGE", "rest", "XRANGE", "rest", "XDEL", "rest", "XDEL", "rest"]),
        (True, ["XRANGE", "XRANGE", "XDEL", "XDEL"]),
    ],
)
async def test_the_archiver_rests_after_each_step_unless_no_requests_come(
    quiet: bool, expected: list[str], store: Store, archive: Archive, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    async def rest(seconds: float) -> None:
        assert seconds > 0
        steps.append("rest")

    await write(store, "alice", 1, 2 * archiver_module.READ_AT_ONCE)
    archiver = Archiver(Watched(store, steps), archive, metrics)
    archiver.quiet = lambda: quiet
    with monkeypatch.context() as patched:
        patched.setattr(archiver_module, "asyncio", SimpleNamespace(sleep=rest))  # no other sleeper's
        await archiver.sweep()
    assert steps == expected


async def test_a_crash_between_archive_and_trim_doubles_nothing(
    store: Store, archive: Archive, archiver: Archiver, metrics: Metrics
) -> None:
    async def crash() -> None:
        raise StoreUnavailable("gone")

    await write(store, "alice", 1, 10)
    with pytest.raises(StoreUnavailable):
        await Archiver(Interrupted(store, "XDEL", crash), archive, metrics).sweep()
    assert len(await archived(archive, "alice")) == await left_in_store(store, "alice") == 10

    await write(store, "alice", 11, 12)
    await archiver.sweep()

    assert [one.sequence for one in await archived(archive, "alice")] == list(range(1, 13))
    assert await left_in_store(store, "alice") == 0
    assert not await archive.conflicts()
    assert counted(metrics, "quota_gateway_ledger_archived_total") == 12


async def test_an_entry_that_comes_while_others_are_archived_is_not_trimmed(
    store: Store, archive: Archive, archiver: Archiver, metrics: Metrics
) -> None:
    await write(store, "alice", 1, 3)
    await Archiver(Interrupted(store, "XDEL", lambda: write(store, "alice", 4, 5)), archive, metrics).sweep()
    assert await left_in_store(store, "alice") == 2
    await archiver.sweep()
    assert [one.sequence for one in await archived(archive, "alice")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_while_the_database_fails_nothing_is_trimmed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, store: Store, metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(archiver_module, "PAUSE_S", 0.01)
    blocker = tmp_path / "blocked"
    if kind == "sqlite":
        blocker.write_text("a file, where the archive's directory must be")
        url = f"sqlite://{blocker}/ledger.sqlite3"
    else:
        url = new_database(request.getfixturevalue("cluster"))
    await write(store, "alice", 1, 10)

    async with archiving(store, Archive(url, tmp_path), metrics), asyncio.timeout(30):
        while counted(metrics, "quota_gateway_ledger_archive_failures_total") < 2:
            await asyncio.sleep(0.01)
        assert await left_in_store(store, "alice") == 10
        assert "the ledger stays in the store, which grows: the ledger's archive: " in caplog.text

        if kind == "sqlite":
            blocker.unlink()
        else:
            make_database(url)
        while await left_in_store(store, "alice"):
            await asyncio.sleep(0.01)

    async with archive_at(url) as archive:
        assert len(await archived(archive, "alice")) == 10


async def test_two_archivers_at_once_archive_everything_once(
    url: str, store: Store, archive: Archive, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver_module, "READ_AT_ONCE", 7)
    monkeypatch.setattr(archiver_module, "TRANSACTION", 14)
    accounts = [f"a{number}" for number in range(5)]

    async def write_slowly() -> None:
        for sequence in range(1, 61):
            await asyncio.gather(*(write(store, account, sequence, sequence) for account in accounts))

    async with archive_at(url) as second:
        both = [Archiver(store, archive, metrics), Archiver(store, second, metrics)]
        writing = asyncio.create_task(write_slowly())
        while not writing.done() or await left_in_store(store, *accounts):
            await asyncio.gather(*(one.sweep() for one in both))

    for account in accounts:
        assert [one.sequence for one in await archived(archive, account)] == list(range(1, 61))
    assert not await archive.conflicts()
    assert counted(metrics, "quota_gateway_ledger_archived_total") == 300


async def test_a_store_whose_memory_is_full_is_still_trimmed(
    store: Store, archive: Archive, archiver: Archiver, valkey: TimedServer
) -> None:
    await write(store, "alice", 1, 3)
    await archiver.sweep()
    await write(store, "alice", 4, 6)
    valkey.server.command("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(StoreRefused, match="OOM"):
            await write(store, "alice", 7, 7)
        await archiver.sweep()
    finally:
        valkey.server.command("CONFIG", "SET", "maxmemory", 0)
    assert await left_in_store(store, "alice") == 0
    assert len(await archived(archive, "alice")) == 6


async def test_another_archive_is_refused(
    url: str, tmp_path: Path, store: Store, archive: Archive, archiver: Archiver, metrics: Metrics
) -> None:
    await write(store, "alice", 1, 3)
    await archiver.sweep()
    await write(store, "alice", 4, 6)

    async with archive_at(f"sqlite://{tmp_path}/other.sqlite3") as other:
        with pytest.raises(ForeignArchive, match="all gateways of a store must have the same archive"):
            await Archiver(store, other, metrics).sweep()
        with pytest.raises(ForeignArchive):
            await Auditor(store, other).tail("alice", 10)
    assert await left_in_store(store, "alice") == 3

    await archiver.sweep()
    assert len(await archived(archive, "alice")) == 6


async def test_an_entry_that_the_store_lost_gives_way_and_is_kept_and_told(
    url: str, store: Store, archive: Archive, archiver: Archiver, caplog: pytest.LogCaptureFixture
) -> None:
    await write(store, "alice", 1, 2)
    await archiver.sweep()
    # A replica that had not seen entry 2 was made the primary.
    await write(store, "alice", 2, 2, id="another")
    await write(store, "alice", 3, 3)

    await archiver.sweep()

    assert [one.id for one in await archived(archive, "alice")] == ["op-1", "another", "op-3"]
    assert not await archive.conflicts()
    [(account, reason)] = await archive.lost("alice")
    assert account == "alice"
    assert reason.startswith("lost by the store in a failover: ledger entry 2 of account alice (stream ")
    assert [record.levelname for record in caplog.records if reason in record.getMessage()] == ["ERROR"]
    [(content,)] = sql(url, "SELECT content FROM ledger_conflicts")
    assert "op-2" in content
    assert await left_in_store(store, "alice") == 0
    assert not await archive.lost("bob")


#: As earlier versions made it.
EARLIER_TABLE = """CREATE TABLE ledger_entries (
    shard INTEGER NOT NULL, stream_id TEXT NOT NULL, account TEXT NOT NULL, sequence BIGINT NOT NULL,
    kind TEXT NOT NULL, id TEXT NOT NULL, time_ms BIGINT NOT NULL, postings TEXT NOT NULL,
    used_after TEXT NOT NULL, balance_after_nano BIGINT NOT NULL, plan TEXT NOT NULL, model TEXT NOT NULL,
    key TEXT NOT NULL, price_version TEXT NOT NULL, source TEXT NOT NULL, tokens TEXT NOT NULL,
    reason TEXT NOT NULL, extra TEXT NOT NULL,
    PRIMARY KEY (shard, stream_id), UNIQUE (account, sequence))"""


@pytest.fixture
async def earlier_table(url: str, archiver: Archiver) -> None:
    await archiver.claim()
    sql(url, "DROP TABLE ledger_entries")
    sql(url, EARLIER_TABLE)


@pytest.mark.usefixtures("earlier_table")
async def test_the_table_of_an_earlier_version_takes_the_same_entries(
    store: Store, archive: Archive, archiver: Archiver
) -> None:
    await write(store, "alice", 1, 30)
    await archiver.sweep()
    # A replica that had not seen the last entry was made the primary.
    await write(store, "alice", 30, 30, id="another")
    await write(store, "alice", 31, 31)

    await archiver.sweep()

    entries = await archived(archive, "alice")
    assert [one.sequence for one in entries] == list(range(1, 32))
    assert [one.id for one in entries[-2:]] == ["another", "op-31"]
    assert len(await archive.lost("alice")) == 1
    assert not await archive.conflicts()
    assert await left_in_store(store, "alice") == 0


@pytest.mark.usefixtures("earlier_table")
@pytest.mark.parametrize("sequence", [1, 2])
async def test_an_entry_whose_place_that_table_has_given_to_another_is_kept_and_told(
    url: str, store: Store, archive: Archive, archiver: Archiver, sequence: int
) -> None:
    await write(store, "alice", 1, 2)
    await archiver.sweep()
    first, second = await archived(archive, "alice")
    stream = shard_keys(first.shard).ledger
    sql(url, f"UPDATE ledger_entries SET account = 'bob' WHERE sequence = {second.sequence}")
    fields = {"account": "alice", "sequence": sequence, "kind": "grant", "id": "again", "time": START_MS}
    more = {"postings": "bought -1 balance 1", "used_after": "", "balance_after": sequence, "note": "{}"}
    await store.call("DEL", stream)
    await store.call("XADD", stream, second.stream_id, *(word for pair in {**fields, **more}.items() for word in pair))

    await archiver.sweep()

    contents = [content for (content,) in sql(url, "SELECT content FROM ledger_conflicts")]
    assert sum("again" in content for content in contents) == 1
    assert await left_in_store(store, "alice") == 0


async def test_an_entry_that_cannot_be_read_is_kept_whole(
    url: str, store: Store, archive: Archive, archiver: Archiver, caplog: pytest.LogCaptureFixture
) -> None:
    await write(store, "alice", 1, 1)
    await write(store, "alice", 2, 2, postings="bought one balance 1")
    await write(store, "alice", 3, 3)
    await store.call("XADD", shard_keys(shard_of("alice")).ledger, "*", b"\xff\x00", "garbage")

    await archiver.sweep()

    assert [one.sequence for one in await archived(archive, "alice")] == [1, 3]
    assert await left_in_store(store, "alice") == 0
    reasons = [reason for _, reason in await archive.conflicts()]
    assert "'one' is not a whole number" in reasons[0] and "cannot be read" in reasons[1]
    contents = [json.loads(content) for (content,) in sql(url, "SELECT content FROM ledger_conflicts")]
    assert ["bought one balance 1" in content for content in contents].count(True) == 1
    assert sum("cannot be read" in record.getMessage() for record in caplog.records) == 2


async def test_what_an_entry_has_beyond_the_known_is_archived_too(
    store: Store, archive: Archive, archiver: Archiver
) -> None:
    note = {"price": "00c0ffee", "tokens": {"input": 7}, "source": "chat", "later": [1, 2.5]}
    await write(store, "alice", 1, 1, note=json.dumps(note), newer="field", model="m", key="0" * 24)
    await write(store, "alice", 2, 2, note='{"reason": NaN}')
    await write(store, "alice", 3, 3, note='{"reason": "\\ud800\\u0000"}', used_after="86400000:5")

    await archiver.sweep()

    one, two, three = await archived(archive, "alice")
    assert (one.price_version, one.tokens, one.source) == ("00c0ffee", {"input": 7}, "chat")
    assert (one.model, one.key) == ("m", "0" * 24)
    assert one.extra == {"newer": "field", "note": {"later": [1, 2.5]}}
    assert two.extra == {"note": {"text": '{"reason": NaN}'}}
    assert (three.reason, three.extra, three.used_after) == ("", {"note": {"reason": "\ud800\0"}}, {86400000: 5})
    assert not await archive.conflicts()


async def test_readers_lose_and_double_nothing_while_the_archiver_moves(
    store: Store, archive: Archive, archiver: Archiver, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver_module, "READ_AT_ONCE", 3)
    monkeypatch.setattr(archiver_module, "TRANSACTION", 3)
    # Of one shard, so that their entries are in one stream.
    neighbours = [name for number in range(3000) if shard_of(name := f"n{number}") == shard_of("n0")][:3]
    await asyncio.gather(*(write(store, name, 1, 8) for name in neighbours))
    moved = False

    async def stop_after_one() -> None:
        nonlocal moved
        if moved:
            raise StoreUnavailable("gone")
        moved = True

    async def move() -> None:
        """One transaction."""
        nonlocal moved
        moved = False
        with suppress(StoreUnavailable):
            await Archiver(Interrupted(store, "XRANGE", stop_after_one), archive, metrics).sweep()

    await move()

    auditor = Auditor(Interrupted(store, "XRANGE", move), archive)
    for name in neighbours:
        assert [one.sequence for one in await auditor.tail(name, 6)] == [3, 4, 5, 6, 7, 8]
        await write(store, name, 9, 12)
    exported = [one async for one in auditor.export(None, EVER)]
    for name in neighbours:
        assert [one.sequence for one in exported if one.account == name] == list(range(1, 13))
    await asyncio.gather(*(write(store, name, 13, 20) for name in neighbours))
    # From the middle of what is archived to the middle of what is not.
    period = Period(START_MS + 5, START_MS + 18)
    exported = [one async for one in auditor.export(neighbours[1], period)]
    assert [one.sequence for one in exported] == list(range(5, 18))


async def test_an_archive_that_was_never_made_is_read_as_empty_and_not_made(url: str, store: Store) -> None:
    await write(store, "alice", 1, 3)
    async with archive_at(url) as archive:
        assert [one.sequence for one in await Auditor(store, archive).tail("alice", 2)] == [2, 3]
        assert await archive.find() is None
    if url.startswith("sqlite"):
        assert not Path(url.removeprefix("sqlite://")).exists()


async def test_tables_of_another_version_are_not_touched(
    url: str, store: Store, archive: Archive, archiver: Archiver
) -> None:
    await archive.open()
    sql(url, "UPDATE archive_meta SET value = '99' WHERE name = 'version'")
    await write(store, "alice", 1, 1)
    async with archive_at(url) as again:
        with pytest.raises(ArchiveError, match="tables of version 99; this gateway knows 1"):
            await again.open()


@pytest.mark.parametrize("wrong", ["mysql://x/y", "sqlite://", "sqlite://host/file", "ledger.db"])
def test_a_url_that_names_no_archive(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"archive\.url is sqlite, sqlite:///absolute/path or a postgresql:// URL"):
        Archive(wrong, tmp_path)


async def test_a_database_server_that_hangs_holds_nobody(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_database(cluster)
    make_database(url)
    monkeypatch.setattr(archive_module, "_ANSWER_S", 0.3)
    monkeypatch.setattr(archive_module, "_CLOSE_S", 0.3)
    archive = Archive(url, tmp_path)
    await archive.open()
    [(pid,)] = sql(
        url, "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ArchiveError, match="does not answer"):
            await archive.conflicts()
        await archive.close()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_postgresql_without_its_driver_names_the_extra(tmp_path: Path) -> None:
    with (
        patch.dict("sys.modules", {"psycopg": None}),
        pytest.raises(ArchiveError, match=r"pip install 'quota-gateway\[postgresql\]'"),
    ):
        # What another test has imported already.
        sys.modules.pop("gateway.credits.archive_postgresql", None)
        Archive("postgresql://localhost/ledger", tmp_path)


async def test_no_message_holds_the_database_password(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as refused:
        Archive("postgresql://me:hunter2@[::1/ledger", tmp_path)
    async with archive_at(f"postgresql://me:hunter2@/ledger?host={tmp_path}") as archive:
        with pytest.raises(ArchiveError) as unreachable:
            await archive.open()
    assert "hunter2" not in f"{refused.value} {unreachable.value}"
