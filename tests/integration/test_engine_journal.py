"""What the engine owes the store while the store is away, forgets or goes back in time."""

import asyncio
import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.credits import ends
from gateway.credits.errors import StoreRefused, StoreUnavailable, UnknownReservation
from gateway.credits.journal import Journal, JournalEntry
from gateway.credits.keyspace import money_keys
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity, Seen
from gateway.credits.store import Store
from gateway.domain.plan import DAY_MS
from gateway.domain.price import FEMTO_PER_NANO
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS, TimedServer
from tests.engine_calls import (
    ACCOUNT,
    CREDIT,
    HOUR_MS,
    SHARD,
    check_books,
    extend,
    hold,
    last_entry,
    ledger,
    lose_record,
    new_identity,
    settle,
    spend,
)
from tests.servers import MovableClock, ValkeyServer


async def test_what_the_store_could_not_take_lands_after_a_restart_of_the_gateway(
    own_server: ValkeyServer, own_store: Store, metrics: Metrics, tmp_path: Path
) -> None:
    directory = tmp_path / "restarted"
    journal = Journal(directory)
    await journal.open()
    engine = CreditEngine(own_store, PLANS, "standard", metrics, journal)
    operator = Operator(own_store, PLANS, "standard")
    identity = await new_identity(operator, engine, ACCOUNT, "standard")
    charged, given_up = await hold(engine, identity, 40_000_000), await hold(engine, identity, 50_000_000)
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        await settle(engine, charged, 30_000_000, '{"tokens": {"output": 3}}')
    await engine.void(given_up)
    assert journal.pending == 2
    assert await engine.close(0) == 2  # the gateway ends before the store is back
    await journal.close()

    own_server.start()
    assert await own_store.wait_connected(30)
    assert (await operator.funds(ACCOUNT)).held_nano == 90_000_000
    journal = Journal(directory)
    await journal.open()
    engine = CreditEngine(own_store, PLANS, "standard", metrics, journal)
    assert await engine.replay() == 2
    assert await engine.close(30) == 0
    assert journal.pending == 0
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (30_000_000, 0)
    entry = (await ledger(own_store))[-1]
    assert (entry["kind"], entry["id"], entry["note"], entry["model"], entry["key"]) == (
        *("settle", charged.id, '{"tokens": {"output": 3}}', "model"),
        identity.key_id,
    )
    await check_books(own_store)
    assert await engine.replay() == 0
    await journal.close()


async def test_a_store_that_is_full_has_its_settlements_in_the_journal_until_it_takes_them(
    own_store: Store, own_engine: CreditEngine, own_operator: Operator, own_acme: Identity, journal: Journal
) -> None:
    held = await hold(own_engine, own_acme, 40_000_000)
    await own_store.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreRefused, match="OOM"):
        await settle(own_engine, held, 30_000_000)
    assert journal.pending == 1
    assert (await own_operator.funds(ACCOUNT)).held_nano == 40_000_000
    await own_store.call("CONFIG", "SET", "maxmemory", 0)
    assert await own_engine.close(30) == 0
    assert journal.pending == 0
    assert (await own_operator.funds(ACCOUNT)).used_nano == 30_000_000


@pytest.mark.parametrize(("cost", "paid"), [(0, (0, 0, 0)), (150_000_000, (100_000_000, 50_000_000, 0))])
async def test_a_request_whose_reservation_the_store_lost_is_charged_all_the_same(
    engine: CreditEngine,
    operator: Operator,
    store: Store,
    acme: Identity,
    clock: MovableClock,
    cost: int,
    paid: tuple[int, int, int],
) -> None:
    await operator.credit(ACCOUNT, CREDIT, "grant")
    held = await hold(engine, acme, 1)
    await settle(engine, held, 0)  # so that nothing is held, and then it is as if it had never been
    await lose_record(store, held.id)
    clock.move(HOUR_MS - 1)
    settlement = await settle(engine, held, cost, "note")
    assert (settlement.from_allowance_nano, settlement.from_balance_nano, settlement.written_off_nano) == paid
    assert settlement.repeated is False
    entry = (await ledger(store))[-1]
    assert (entry["kind"], entry["id"], entry["note"], entry["model"], entry["key"]) == (
        *("settle", held.id, "note", "model"),
        acme.key_id,
    )
    assert (await settle(engine, held, 7)).repeated
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.balance_nano) == (paid[0], CREDIT - paid[1])
    await check_books(store)


async def test_a_lost_reservation_is_charged_at_the_rate_that_it_was_made_at(
    engine: CreditEngine, operator: Operator, store: Store
) -> None:
    dev = await new_identity(operator, engine, ACCOUNT, "developer")
    held = await hold(engine, dev, 10)
    await engine.void(held)
    await lose_record(store, held.id)
    assert (await settle(engine, held, 1_000_000_001)).from_allowance_nano == 900_000_001
    await check_books(store)


async def test_a_lost_reservation_that_crosses_midnight_counts_in_the_window_of_now(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    clock.move(11 * HOUR_MS)  # half an hour before it
    held = await spend(engine, acme, 1)
    await lose_record(store, held.id)
    clock.move(HOUR_MS - 1)
    await spend(engine, acme, 10)
    await settle(engine, held, 30_000_000)
    assert (await operator.funds(ACCOUNT)).used_nano == 30_000_010
    await operator.set_plan(ACCOUNT, "payg")
    assert (await operator.set_plan(ACCOUNT, "standard")).used_nano == 30_000_010
    await check_books(store)


async def test_one_made_an_hour_ago_may_have_been_forgotten_and_is_not_charged_again(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await spend(engine, acme, 10)
    clock.move(HOUR_MS - 1)
    await lose_record(store, held.id)
    other = await hold(engine, acme, 5)
    clock.move(1)
    with pytest.raises(UnknownReservation):
        await settle(engine, held, 10)
    assert (await settle(engine, other, 5)).cost_nano == 5
    await check_books(store)


async def test_after_a_failover_the_last_settlements_and_voids_are_said_again(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    """The new primary had the reservations, not their ends."""
    first, second, voided = [await hold(engine, acme, 20_000_000) for _ in range(3)]
    await settle(engine, first, 5_000_000)
    dumps: dict[str, Any] = {key: await store.call("DUMP", key) for key in money_keys(ACCOUNT)}
    await settle(engine, second, 7_000_000)
    await engine.void(voided)
    for key, dump in dumps.items():
        await store.call("RESTORE", key, 0, dump, "REPLACE")
    assert (await operator.funds(ACCOUNT)).used_nano == 5_000_000

    assert store.on_failover is not None
    store.on_failover()
    assert await engine.close(30) == 0
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (12_000_000, 0)
    assert [entry["kind"] for entry in await ledger(store)].count("settle") == 2
    assert (await operator.void_reservation(voided.id)).repeated
    await check_books(store)


async def test_what_ended_long_before_a_failover_is_not_said_again(
    engine: CreditEngine,
    store: Store,
    acme: Identity,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(3):
        await settle(engine, await hold(engine, acme, 5), 5)
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 61, perf_counter=time.perf_counter)
    monkeypatch.setattr(ends, "time", later)
    await settle(engine, await hold(engine, acme, 5), 5)
    assert store.on_failover is not None
    store.on_failover()
    assert "the last 1 reservations" in caplog.text
    assert await engine.close(30) == 0
    await check_books(store)


async def test_what_is_remembered_for_a_failover_is_no_work_for_the_collector_of_cycles(
    engine: CreditEngine, acme: Identity
) -> None:
    for _ in range(50):
        await settle(engine, await hold(engine, acme, 5), 5)
    assert sum(type(one) is JournalEntry for one in gc.get_objects()) < 10


async def test_a_settlement_of_an_answer_that_outlived_its_lost_reservation_is_whole(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    """Extended after the loss, and settled: one charge, of the whole cost."""
    held = await hold(engine, acme, 0)
    await lose_record(store, held.id)
    await extend(engine, held, 60_000_000, seen=10)
    assert held.reserved.payg_nano == 60_000_000
    await settle(engine, held, 55_000_000)
    kind, id_, postings = await last_entry(store)
    assert (kind, id_, postings[f"used:{DAY_MS}"]) == ("settle", held.id, 55_000_000)
    await check_books(store)


async def test_a_renewal_that_comes_after_the_end_of_a_lost_reservation_holds_nothing(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    ended = await hold(engine, acme, 0)
    await lose_record(store, ended.id)
    await engine.void(ended)
    await extend(engine, ended, 60_000_000)
    assert (await operator.funds(ACCOUNT)).held_nano == 0
    assert await operator.reservations(ACCOUNT) == []


async def test_calls_that_are_cancelled_while_the_store_is_away_are_not_forgotten(
    own_server: ValkeyServer,
    own_engine: CreditEngine,
    own_operator: Operator,
    own_acme: Identity,
    journal: Journal,
) -> None:
    held = await hold(own_engine, own_acme, 40_000_000)
    own_server.pause()
    settling = asyncio.create_task(own_engine.settle(held, 30_000_000 * FEMTO_PER_NANO, ""))
    await asyncio.sleep(0.05)
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)
    own_server.resume()
    assert await own_engine.close(30) == 0
    funds = await own_operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (30_000_000, 0)
    assert journal.pending == 0


async def test_what_was_seen_is_kept_for_the_next_renewal_when_the_store_was_away(
    engine: CreditEngine, operator: Operator, store: Store, valkey: TimedServer, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    valkey.server.command("CLIENT", "KILL", "TYPE", "normal")
    with pytest.raises(StoreUnavailable):
        await extend(engine, held, 0, seen=8_000_000, note="so far")
    assert held.seen == Seen(8_000_000 * FEMTO_PER_NANO, "so far")
    assert await store.wait_connected(30)
    await engine.extend(held, 0, held.seen)
    clock.move(DAY_MS // 12)
    assert await engine.expire_due(SHARD) == 1
    assert (await operator.funds(ACCOUNT)).used_nano == 8_000_000
