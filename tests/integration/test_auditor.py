"""``ledger verify`` on a real store: silent about whatever the scripts do, and naming whatever anything else does."""

import json
import random
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.credits import auditor as auditor_module
from gateway.credits import scripts
from gateway.credits.archive import Archive
from gateway.credits.archiver import Archiver
from gateway.credits.auditor import Auditor, auditing
from gateway.credits.errors import EngineError, UnknownAccount
from gateway.credits.keyspace import account_key, reservation_id, shard_keys, shard_of
from gateway.credits.store import Store
from gateway.domain.decision import Reserved
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.telemetry.metrics import Metrics
from tests.servers import MovableClock

ACCOUNT = "alice"
HOUR_MS = 3_600_000
STANDARD = Plan("standard", (Allowance("per_window", 1000, DAY_MS),))
PLANS = (
    STANDARD,
    Plan("layered", (Allowance("per_window", 300, HOUR_MS), Allowance("monthly", 60_000, DAY_MS)), rate_ppm=900_000),
    Plan("eights", (Allowance("per_window", 700, 8 * HOUR_MS),), on_lost="charge_hold"),
    Plan("wide", (Allowance("per_window", 5000, DAY_MS), Allowance("per_window", 200, HOUR_MS)), on_lost="release"),
    Plan("payg"),
)
NOTE = json.dumps({"price": "00c0ffee", "tokens": {"input": 3, "output": 4}, "source": "api"})


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def auditor(store: Store, data_dir: Path) -> AsyncIterator[Auditor]:
    async with auditing(store, "sqlite", data_dir) as auditor:
        yield auditor


@pytest.fixture
async def archiver(store: Store, data_dir: Path, metrics: Metrics) -> AsyncIterator[Archiver]:
    archive = Archive("sqlite", data_dir)
    yield Archiver(store, archive, metrics)
    await archive.close()


def cost(nano: int, plan: Plan) -> Cost:
    return Cost(nano, -(-nano * plan.rate_ppm // 1_000_000))


async def reserve(store: Store, plan: Plan, nano: int, account: str = ACCOUNT) -> str | None:
    """Hold up to so much for a minute; the reservation, or None where nothing is free."""
    reservation = reservation_id(account, secrets.token_hex(12))
    outcome = await scripts.reserve(
        store, account, reservation, plan=plan, amount=cost(nano, plan), minimum_nano=1, alone_nano=1,
        lease_ms=60_000, key_id="", model="model",
    )  # fmt: skip
    return reservation if isinstance(outcome, Reserved) else None


async def settle(store: Store, plan: Plan, reservation: str, nano: int, account: str = ACCOUNT) -> None:
    await scripts.settle(store, account, reservation, plan=plan, cost=cost(nano, plan), note=NOTE)


class Customer:
    """Does at random what an account can live through."""

    def __init__(self, store: Store, clock: MovableClock, seed: int) -> None:
        self.store, self.clock = store, clock
        self.random = random.Random(seed)
        self.plan = STANDARD
        self.open: list[tuple[str, Plan]] = []
        self.ended: list[tuple[str, Plan]] = []
        self.operations = 0

    def _some(self, kept: list[tuple[str, Plan]]) -> tuple[str, Plan] | None:
        return self.random.choice(kept) if kept else None

    async def step(self) -> None:
        steps: list[tuple[int, Callable[[], object]]] = [
            (6, self.reserve), (4, self.settle), (2, self.extend), (2, self.release), (2, self.credit),
            (2, self.wait), (1, self.change_plan), (1, self.refund), (1, self.settle_late),
        ]  # fmt: skip
        [step] = self.random.choices([step for _, step in steps], [weight for weight, _ in steps])
        await step()  # type: ignore[misc]

    async def reserve(self) -> None:
        if reservation := await reserve(self.store, self.plan, self.random.choice((5, 120, 900))):
            self.open.append((reservation, self.plan))

    async def settle(self) -> None:
        if one := self._some(self.open):
            self.open.remove(one)
            self.ended.append(one)
            await settle(self.store, one[1], one[0], self.random.choice((0, 3, 110, 2000)))

    async def settle_late(self) -> None:
        if one := self._some(self.ended):
            await settle(self.store, one[1], one[0], self.random.choice((0, 30, 700)))

    async def extend(self) -> None:
        if one := self._some(self.open):
            await scripts.extend(
                self.store, ACCOUNT, one[0], plan=one[1], wanted=cost(self.random.choice((50, 1500)), one[1]),
                seen=cost(self.random.choice((1, 40, 400)), one[1]), seen_note=NOTE, lease_ms=60_000,
            )  # fmt: skip

    async def release(self) -> None:
        if one := self._some(self.open):
            self.open.remove(one)
            self.ended.append(one)
            await scripts.release(self.store, ACCOUNT, one[0], self.random.choice(("void", "abandon")))

    async def credit(self) -> None:
        self.operations += 1
        kind = self.random.choice(("grant", "grant", "refund", "deduct"))
        amount = self.random.choice((1, 70, 800))
        with suppress(EngineError):
            await scripts.credit(self.store, ACCOUNT, f"op{self.operations}", kind, amount, '{"reason": "why"}')

    async def refund(self) -> None:
        if one := self._some(self.ended):
            self.operations += 1
            with suppress(EngineError):
                await scripts.refund(self.store, ACCOUNT, f"op{self.operations}", one[0], '{"reason": "why"}')

    async def wait(self) -> None:
        self.clock.move(self.random.choice((20 * 60_000, HOUR_MS, 9 * HOUR_MS, DAY_MS // 2)))

    async def change_plan(self) -> None:
        self.operations += 1
        self.plan = self.random.choice(PLANS)
        await scripts.set_plan(self.store, ACCOUNT, f"op{self.operations}", 0, self.plan)


async def test_a_reservation_that_is_opened_again_after_a_refresh_adds_up(
    store: Store, auditor: Auditor, clock: MovableClock
) -> None:
    """Its entry tells of the window that was, and the refresh that the same call makes comes behind it."""
    await scripts.create(store, ACCOUNT, STANDARD)
    other, lost = await reserve(store, STANDARD, 300), await reserve(store, STANDARD, 200)
    assert other and lost
    await settle(store, STANDARD, other, 250)
    clock.move(60_000)
    await scripts.release(store, ACCOUNT, lost, "expire")
    clock.move(DAY_MS)
    await scripts.extend(
        store, ACCOUNT, lost, plan=STANDARD, wanted=cost(400, STANDARD), seen=cost(0, STANDARD), seen_note="",
        lease_ms=60_000,
    )  # fmt: skip
    assert [entry.kind for entry in await auditor.tail(ACCOUNT, 2)] == ["reopen", "refresh"]
    assert not (await auditor.verify(ACCOUNT)).mismatches


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_an_account_lives_through_agrees_with_its_ledger(
    seed: int, store: Store, clock: MovableClock, auditor: Auditor, archiver: Archiver
) -> None:
    await scripts.create(store, ACCOUNT, STANDARD)
    customer = Customer(store, clock, seed)
    for number in range(120):
        await customer.step()
        if number % 7 == 0:
            await archiver.sweep()
        audit = await auditor.verify(ACCOUNT)
        assert [str(one) for one in audit.mismatches] == [], f"after step {number}"
        assert not audit.unchecked


# --- what anything else does to the store or the archive --------------------------------------------------------


class Scene:
    """Two accounts; alice has a grant of 500, a settled request that cost 300, and an open one that holds 700 of the
    allowance and 200 of the balance. All in nano-credits."""

    def __init__(self, store: Store, archiver: Archiver, auditor: Auditor, data_dir: Path) -> None:
        self.store, self.archiver, self.auditor = store, archiver, auditor
        self._file = data_dir / "ledger.sqlite3"
        self.held = ""

    async def make(self) -> None:
        for name in (ACCOUNT, "bob"):
            await scripts.create(self.store, name, STANDARD)
            await scripts.credit(self.store, name, "invoice", "grant", 500, '{"reason": "paid"}')
        settled = await reserve(self.store, STANDARD, 400)
        assert settled is not None
        await settle(self.store, STANDARD, settled, 300)
        held = await reserve(self.store, STANDARD, 900)
        assert held is not None
        self.held = held

    async def window(self, **changes: int) -> None:
        """Change figures of the account's window."""
        names = ("refresh", "end", "granted", "used", "held", "before", "epoch", "first", "adopted", "epochs")
        text = (await self.store.call("HGET", account_key(ACCOUNT), "w1")).decode()
        figures = dict(zip(names, text.split("|"), strict=True)) | {name: str(nano) for name, nano in changes.items()}
        await self.store.call("HSET", account_key(ACCOUNT), "w1", "|".join(figures.values()))

    async def hash(self, field: str, value: int | str) -> None:
        await self.store.call("HSET", account_key(ACCOUNT), field, value)

    async def total(self, name: str) -> None:
        await self.store.call("HINCRBY", account_key(ACCOUNT), f"total_{name}", 1)

    async def entries(self) -> list[tuple[bytes, list[bytes]]]:
        stream = shard_keys(shard_of(ACCOUNT)).ledger
        return [tuple(entry) for entry in await self.store.call("XRANGE", stream, "-", "+")]  # type: ignore[misc]

    async def without_entry(self, sequence: int) -> None:
        [stream_id] = [one for one, fields in await self.entries() if fields[3] == str(sequence).encode()]
        await self.store.call("XDEL", shard_keys(shard_of(ACCOUNT)).ledger, stream_id)

    async def with_garbage(self) -> None:
        await self.store.call("XADD", shard_keys(shard_of(ACCOUNT)).ledger, "*", "account", ACCOUNT, "kind", "grant")

    async def archived(self, statement: str) -> None:
        """Move everything into the archive and change it there."""
        await self.archiver.sweep()
        with closing(sqlite3.connect(self._file, isolation_level=None)) as connection:
            assert connection.execute(statement).rowcount == 1

    async def conflict(self) -> None:
        """A failover to a replica that had not seen entry 4, and knew nothing of it afterwards."""
        entries = await self.entries()
        await self.archiver.sweep()
        [fields] = [fields for _, fields in entries if fields[3] == b"4"]
        forged = [b"forged" if text.startswith(b"rsv_") else text for text in fields]
        await self.store.call("XADD", shard_keys(shard_of(ACCOUNT)).ledger, "*", *forged)
        await self.archiver.sweep()

    async def gone(self) -> None:
        await self.archiver.sweep()
        await self.store.call("DEL", account_key(ACCOUNT))

    async def gone_back(self) -> None:
        await self.archiver.sweep()
        await self.hash("sequence", 3)

    async def without_hold(self) -> None:
        await self.store.call("HDEL", shard_keys(shard_of(ACCOUNT)).records, self.held)


@pytest.fixture
async def scene(store: Store, archiver: Archiver, auditor: Auditor, data_dir: Path) -> Scene:
    scene = Scene(store, archiver, auditor, data_dir)
    await scene.make()
    return scene


SETTLED = "entry 4 (settle rsv_…)"
WINDOW = "the 24 h window"

TAMPERED: dict[str, tuple[Callable[[Scene], object], set[str]]] = {
    "balance": (
        lambda scene: scene.hash("balance", 501),
        {"balance: expected 0.0000005, found 0.000000501"},
    ),
    "balance held": (
        lambda scene: scene.hash("balance_held", 600),
        {
            "balance held: expected at most 0.0000005, the balance, found 0.0000006",
            "balance held by open reservations: expected 0.0000002, found 0.0000006",
        },
    ),
    "balance held below 0": (
        lambda scene: scene.hash("balance_held", -1),
        {
            "balance held: expected 0 or more, found -0.000000001",
            "balance held by open reservations: expected 0.0000002, found -0.000000001",
        },
    ),
    "used": (
        lambda scene: scene.window(used=200),
        {
            f"granted less used of {WINDOW}: expected 0.0000007, found 0.0000008",
            f"used in {WINDOW}: expected 0.0000003, found 0.0000002",
        },
    ),
    "granted and used alike": (
        lambda scene: scene.window(granted=1001, used=301),
        {f"used in {WINDOW}: expected 0.0000003, found 0.000000301"},
    ),
    "held": (
        lambda scene: scene.window(held=701),
        {
            f"held in {WINDOW} by open reservations: expected 0.0000007, found 0.000000701",
            f"used and held in {WINDOW}: expected at most 0.000001, what it grants, found 0.000001001",
        },
    ),
    "before": (
        lambda scene: scene.window(before=1),
        {
            f"held before {WINDOW}: expected 0, found 0.000000001",
            f"before in {WINDOW} by open reservations: expected 0, found 0.000000001",
        },
    ),
    "an open reservation's record": (
        lambda scene: scene.without_hold(),
        {
            "balance held by open reservations: expected 0, found 0.0000002",
            f"held in {WINDOW} by open reservations: expected 0, found 0.0000007",
        },
    ),
    "plan": (lambda scene: scene.hash("plan", "payg"), {"plan: expected standard, found payg"}),
    "total bought": (
        lambda scene: scene.total("bought"),
        {"total bought: expected 0.0000005, found 0.000000501"},
    ),
    "total spent": (lambda scene: scene.total("spent"), {"total spent: expected 0, found 0.000000001"}),
    "total written off": (
        lambda scene: scene.total("written_off"),
        {"total written off: expected 0, found 0.000000001"},
    ),
    "a hash that is none": (
        lambda scene: scene.hash("balance", "much"),
        {"hash in the store: expected one that can be read, found 'much' is not a whole number"},
    ),
    "a lost account": (
        lambda scene: scene.gone(),
        {"hash in the store: expected sequence 4 or later, found none"},
    ),
    "a store that went back": (
        lambda scene: scene.gone_back(),
        {
            "sequence: expected 4 or later, found 3: the store has gone back",
            f"used in {WINDOW}: expected 0, found 0.0000003",
            f"granted less used of {WINDOW}: expected 0.000001, found 0.0000007",
        },
    ),
    "a missing entry": (
        lambda scene: scene.without_entry(3),
        {
            "next entry of the ledger: expected sequence 3, found sequence 4",
            f"balance after {SETTLED}: expected 0, found 0.0000005",
            "balance: expected 0, found 0.0000005",
            "total bought: expected 0, found 0.0000005",
        },
    ),
    "the last entry": (
        lambda scene: scene.without_entry(4),
        {
            "entries of the ledger: expected 4, found 3",
            f"granted less used of {WINDOW}: expected 0.000001, found 0.0000007",
            f"used in {WINDOW}: expected 0, found 0.0000003",
        },
    ),
    "an entry that cannot be read": (
        lambda scene: scene.with_garbage(),
        {
            "stream entry …: expected one that can be read, found entry … of ledger stream 47 cannot be read: "
            "it has no 'sequence'"
        },
    ),
    "a posting": (
        lambda scene: scene.archived(
            """UPDATE ledger_entries SET postings = '{"bought": -500, "balance": 499}'
            WHERE account = 'alice' AND kind = 'grant'"""
        ),
        {
            "sum of the postings of entry 3 (grant invoice): expected 0, found -0.000000001",
            "balance after entry 3 (grant invoice): expected 0.000000499, found 0.0000005",
            "balance: expected 0.000000499, found 0.0000005",
        },
    ),
    "what a window had used": (
        lambda scene: scene.archived(
            """UPDATE ledger_entries SET used_after = '{"86400000": 1}' WHERE account = 'alice' AND kind = 'settle'"""
        ),
        {
            f"used in {WINDOW} after {SETTLED}: expected 0.0000003, found 0.000000001",
            f"used in {WINDOW}: expected 0.000000001, found 0.0000003",
        },
    ),
    "an archived entry": (
        lambda scene: scene.archived("DELETE FROM ledger_entries WHERE account = 'alice' AND sequence = 1"),
        {
            "next entry of the ledger: expected sequence 1, found sequence 2",
            "plan: expected none, found standard",
        },
    ),
}


def matches(line: str, pattern: str) -> bool:
    """Whether a line is the pattern, in which … stands for anything."""
    place = 0
    for text in pattern.split("…"):
        place = line.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


@pytest.mark.parametrize("what", TAMPERED)
async def test_what_was_tampered_with_is_named(what: str, scene: Scene) -> None:
    assert (await scene.auditor.verify()).mismatches == []
    tamper, expected = TAMPERED[what]
    await tamper(scene)  # type: ignore[misc]

    audit = await scene.auditor.verify()

    lines = [str(one) for one in audit.mismatches]
    assert audit.accounts == 2
    assert {one.account for one in audit.mismatches} == {ACCOUNT}, lines
    for pattern in expected:
        assert any(matches(line, f"account {ACCOUNT}: {pattern}") for line in lines), (pattern, lines)
    assert len(lines) == len(expected), lines
    assert (await scene.auditor.verify("bob")).mismatches == []
    assert [str(one) for one in (await scene.auditor.verify(ACCOUNT)).mismatches] == lines


async def test_what_a_failover_lost_is_named_and_accuses_nobody(scene: Scene) -> None:
    await scene.conflict()
    audit = await scene.auditor.verify()
    assert audit.mismatches == []
    [(account, what)] = audit.lost
    assert account == ACCOUNT
    assert what.startswith(f"lost by the store in a failover: ledger entry 4 of account {ACCOUNT} (stream ")


class Restless(Store):
    """A store in which the account changes between any two looks at it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def call(self, *command: str | bytes | int) -> Any:
        if command[0] == "HSCAN":
            await self._store.call("HINCRBY", account_key(ACCOUNT), "seen", 1)
        return await self._store.call(*command)

    async def scan(self, pattern: str) -> list[str]:
        return await self._store.scan(pattern)


async def test_an_account_that_never_stands_still_is_named_not_accused(
    scene: Scene, store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor_module, "_SNAPSHOT_PAUSE_S", 0)
    await scene.without_hold()  # what cannot be compared
    async with auditing(Restless(store), "sqlite", data_dir) as auditor:
        audit = await auditor.verify()
        assert (audit.mismatches, audit.unchecked, audit.accounts, audit.entries) == ([], [ACCOUNT], 2, 7)
        await scene.hash("balance", 501)  # what can
        assert [one.what for one in (await auditor.verify()).mismatches] == ["balance"]


async def test_an_account_that_does_not_exist(auditor: Auditor) -> None:
    with pytest.raises(UnknownAccount, match="there is no account 'nobody'"):
        await auditor.verify("nobody")
    with pytest.raises(UnknownAccount):
        await auditor.tail("nobody", 1)
