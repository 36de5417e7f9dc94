"""Processes do all that can be done to accounts, and are killed in the middle of it: the books still agree."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gateway.credits import scripts
from gateway.credits.archive import Period
from gateway.credits.auditor import auditing
from gateway.credits.keyspace import SHARDS, account_key, shard_keys
from gateway.credits.ledger import Entry
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.acceptance.conftest import NOON
from tests.faults.bank_worker import ACCOUNTS, PLANS
from tests.faults.bench import until
from tests.faults.table import measured
from tests.servers import MovableClock, valkey_cluster, valkey_server

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
WORKERS = 4
#: What the workers are to begin, on each kind of store.
OPERATIONS = 20_000
LEASE_MS = 60_000
_FIELDS = ("balance", "balance_held", "total_bought", "total_refunded", "total_deducted", "total_spent")


class Workers:
    """Processes of ``bank_worker``; each that is killed is replaced by another."""

    def __init__(self, url: str, directory: Path, environment: dict[str, str], generator: random.Random) -> None:
        self._url, self._directory, self._environment, self._random = url, directory, environment, generator
        self._running: list[subprocess.Popen[bytes]] = []
        self.killed = 0

    def start(self) -> None:
        """Start all."""
        self._running = [self._spawn() for _ in range(WORKERS)]

    def kill_one(self) -> None:
        """Kill any one of them, and start another."""
        number = self._random.randrange(WORKERS)
        self._kill(self._running[number])
        self._running[number] = self._spawn()

    def kill_all(self) -> None:
        """Kill all; no others are started."""
        while self._running:
            self._kill(self._running.pop())

    def _kill(self, process: "subprocess.Popen[bytes]") -> None:
        ended = process.poll()
        process.kill()
        process.wait()
        self.killed += 1
        assert ended is None, (self._directory / "stderr").read_text()[-4000:]

    def _spawn(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tests.faults.bank_worker", self._url, str(self._directory)]
        with (self._directory / "stderr").open("ab") as stderr:
            return subprocess.Popen(
                [*command, f"{self._random.getrandbits(64):016x}"],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )


@dataclass
class Diary:
    """What the workers said that they were about to do. By reservation or operation id."""

    reserved: set[str] = field(default_factory=set)
    seen: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    settled: dict[str, tuple[int, int]] = field(default_factory=dict)
    voided: set[str] = field(default_factory=set)
    refunded: set[str] = field(default_factory=set)
    credits: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    credited: set[str] = field(default_factory=set)
    lines: int = 0

    def add(self, line: dict[str, Any]) -> None:
        self.lines += 1
        id_ = line["id"]
        match line["what"]:
            case "reserve":
                self.reserved.add(id_)
            case "seen":
                self.seen[id_] = max(self.seen[id_], line["nano"])
            case "settle":
                self.settled[id_] = (line["least"], line["most"])
            case "void":
                self.voided.add(id_)
            case "refund_request":
                self.refunded.add(id_)
            case "credited":
                self.credited.add(id_)
            case kind:
                self.credits[id_] = (kind, line["account"], line["nano"])

    @classmethod
    def read(cls, directory: Path) -> "Diary":
        diary = cls()
        for path in directory.glob("diary-*"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                diary.add(json.loads(line))
        return diary


def lines_in(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("diary-*"))


@dataclass(frozen=True)
class Ground:
    """A store to work on; without a clock its leases are ended by force."""

    url: str
    clock: MovableClock | None

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **(self.clock.environment if self.clock else {})}


@contextmanager
def ground(kind: str, directory: Path) -> Iterator[Ground]:
    with ExitStack() as stack:
        if kind == "cluster":
            yield Ground(stack.enter_context(valkey_cluster()).url, None)
            return
        clock = MovableClock(directory / "clock")
        clock.set_to(NOON)
        stack.enter_context(patch.object(scripts, "gateway_ms", clock.now_ms))
        yield Ground(stack.enter_context(valkey_server(clock=clock)).url, clock)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["server", "cluster"])
async def test_no_credit_appears_or_vanishes(kind: str, tmp_path: Path) -> None:
    generator = random.Random(7)
    with ground(kind, tmp_path) as there:
        store = Store(there.url, 10_000, Metrics(PLANS, ["model"]))
        await store.start()
        operator = Operator(store, PLANS, "prepaid")
        for account in ACCOUNTS:
            await operator.create_account(account, generator.choice(list(PLANS)))
        workers = Workers(there.url, tmp_path, there.environment, generator)
        workers.start()
        try:
            while lines_in(tmp_path) < OPERATIONS:
                await asyncio.sleep(generator.uniform(1, 3))
                workers.kill_one()
                if there.clock is not None:
                    # Leases run out under those that live, and now and then a window ends.
                    there.clock.move(generator.choice((5_000, 30_000, LEASE_MS + 1000, 600_000)))
        finally:
            workers.kill_all()
        await _end_all(store, operator, there)
        diary = Diary.read(tmp_path)
        await _check_reservations(store, diary)
        await _check_money(store, diary, tmp_path)
        await store.close()
    measured("workers killed", 0, "nano-credits", f"{diary.lines} operations on a {kind}, {workers.killed} kills")


async def _end_all(store: Store, operator: Operator, there: Ground) -> None:
    """Let all leases run out, and end what they held. The store may still be busy with what the dead had sent."""

    async def end_those_that_are_over() -> bool:
        if there.clock is None:
            await operator.abandon_orphans(await operator.now_ms() + 1)
        else:
            there.clock.move(LEASE_MS + 1000)
            for shard in range(SHARDS):
                _, due = await scripts.due(store, shard, 10_000)
                for reservation, account in due:
                    assert await scripts.release(store, account, reservation, "expire") is not None
        return await operator.reservations() == []

    await until(end_those_that_are_over)


async def _check_reservations(store: Store, diary: Diary) -> None:
    """Each ended in a way that somebody meant it to, and was charged what that way charges."""
    states: Counter[str] = Counter()
    for shard in range(SHARDS):
        flat = await store.call("HGETALL", shard_keys(shard).records)
        for name, text in zip(flat[::2], flat[1::2], strict=True):
            id_ = name.decode()
            if not id_.startswith("rsv_"):
                continue
            fields = text.decode().split("|")
            state, parts, from_balance = fields[0], fields[2], int(fields[3])
            written_off = int(fields[15] if state == "expired" else fields[4])
            cost = sum(int(part.split("@")[0]) for part in parts.split(";") if part) + from_balance + written_off
            states[state] += 1
            assert id_ in diary.reserved
            match state:
                case "settled":
                    least, most = diary.settled[id_]
                    assert least <= cost <= most, (id_, fields)
                case "expired":
                    assert cost <= diary.seen[id_], (id_, fields)
                case "voided":
                    assert id_ in diary.voided
                    assert cost == 0
                case _:
                    assert state == "refunded"
                    assert id_ in diary.refunded
    assert all(states[state] for state in ("settled", "expired", "voided", "refunded")), states


async def _check_money(store: Store, diary: Diary, directory: Path) -> None:
    """The ledger sums up to the accounts; and credits came and went only by operations that were meant, each once."""
    entries: list[Entry] = []
    async with auditing(store, "sqlite", directory) as auditor:
        audit = await auditor.verify()
        assert audit.mismatches == [], "\n".join(map(str, audit.mismatches))
        assert audit.unchecked == []
        assert audit.accounts == len(ACCOUNTS)
        entries = [entry async for entry in auditor.export(None, Period())]
    done = Counter(entry.id for entry in entries if entry.kind in ("grant", "refund", "deduct"))
    assert set(done.values()) == {1}
    assert diary.credited <= set(done) <= set(diary.credits)
    added: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for entry in entries:
        spent[entry.account] += entry.postings.get("spent", 0)
        if entry.id in diary.credits:
            kind, account, nano = diary.credits[entry.id]
            assert (entry.kind, entry.account) == (kind, account)
            assert abs(entry.postings["balance"]) == nano
            added[account] += -nano if kind == "deduct" else nano
    for account in ACCOUNTS:
        values = await store.call("HMGET", account_key(account), *_FIELDS)
        balance, held, bought, refunded, deducted, total_spent = (int(value or 0) for value in values)
        assert held == 0
        assert 0 <= balance == added[account] - spent[account]
        assert added[account] == bought + refunded - deducted
        assert total_spent == spent[account]
