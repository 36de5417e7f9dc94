"""Leases: the living renew theirs, and what becomes of the requests of a gateway that died."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace

import pytest

from gateway.credits import scripts, service
from gateway.credits.errors import UnknownAccount, UnknownReservation
from gateway.credits.operator import Operator
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Seen
from gateway.credits.store import Store
from gateway.domain.plan import DAY_MS, Plan
from gateway.domain.price import FEMTO_PER_NANO, Cost
from tests.conftest import PLANS as BASE_PLANS
from tests.engine_calls import (
    ACCOUNT,
    HOUR_MS,
    SHARD,
    check_books,
    extend,
    hold,
    last_entry,
    ledger,
    lose_gateway,
    new_identity,
    settle,
    spend,
)
from tests.servers import MovableClock

#: The standard plan (0.1 credits a day, then prepaid ones) with every way to charge what was lost; one at a rate.
PLANS = {
    "seen": replace(BASE_PLANS["standard"], name="seen", on_lost="charge_seen"),
    "hold": replace(BASE_PLANS["standard"], name="hold", on_lost="charge_hold"),
    "free": replace(BASE_PLANS["standard"], name="free", on_lost="release"),
    "cheap": replace(BASE_PLANS["standard"], name="cheap", on_lost="charge_hold", rate_ppm=900_000),
}


@pytest.fixture
def plans() -> Mapping[str, Plan]:
    return PLANS


async def test_a_living_gateways_leases_are_renewed_with_what_was_seen(
    engine: CreditEngine,
    operator: Operator,
    store: Store,
    acme: Identity,
    clock: MovableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "RENEW_S", 0.02)
    streaming = await hold(engine, acme, 40_000_000)
    ended = await hold(engine, acme, 1)
    await settle(engine, ended, 1)
    clock.move(LEASE_MS - 1)
    streaming.look = lambda: Seen(7_000_000 * FEMTO_PER_NANO, '{"tokens": {"output": 7}}')
    renewing = asyncio.create_task(engine.keep_leases())
    while (await operator.reservations())[0].lease_expires_at_ms <= clock.now_ms() + 1:
        await asyncio.sleep(0.01)
    renewing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await renewing
    clock.move(1)
    assert await engine.expire_due(SHARD) == 0
    assert streaming.reserved.from_allowance_nano == 40_000_000

    await lose_gateway(engine, clock)
    assert (await operator.funds(ACCOUNT)).used_nano == 7_000_001
    entry = (await ledger(store))[-1]
    assert (entry["kind"], entry["id"], entry["note"], entry["model"], entry["key"]) == (
        *("expire", streaming.id, '{"tokens": {"output": 7}}', "model"),
        acme.key_id,
    )
    await check_books(store)


@pytest.mark.parametrize(("plan", "charged"), [("seen", 12_000_000), ("hold", 40_000_000), ("free", 0)])
@pytest.mark.parametrize("late", [0, 12_000_000, 25_000_000, 60_000_000])
async def test_what_a_dead_gateways_stream_is_charged_and_what_its_late_settlement_adds(
    engine: CreditEngine,
    operator: Operator,
    store: Store,
    clock: MovableClock,
    plan: str,
    charged: int,
    late: int,
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, plan)
    held = await hold(engine, identity, 40_000_000)
    await extend(engine, held, 0, seen=12_000_000, note="so far")
    await lose_gateway(engine, clock)
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (charged, 0)
    entry = (await ledger(store))[-1]
    assert entry["kind"] == ("expire" if charged else "refresh")
    if charged:
        assert (entry["note"], entry["model"], entry["key"]) == ("so far", "model", identity.key_id)
    await check_books(store)

    settlement = await settle(engine, held, late)
    assert (settlement.state, settlement.cost_nano, settlement.repeated) == ("settled", late, False)
    kind, id_, postings = await last_entry(store)
    assert (kind, id_) == ("settle", held.id)
    assert postings.get(f"used:{DAY_MS}", 0) == late - charged
    again = await settle(engine, held, 99)
    assert (again.repeated, again.cost_nano) == (True, late)
    assert (await operator.funds(ACCOUNT)).used_nano == late
    await check_books(store)


async def test_a_late_settlement_moves_prepaid_credits_by_the_difference_only(
    engine: CreditEngine, operator: Operator, store: Store, clock: MovableClock
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, "hold")
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    await spend(engine, identity, 80_000_000)
    cheaper, dearer = [await hold(engine, identity, 30_000_000) for _ in range(2)]
    assert dearer.reserved.from_balance_nano == 30_000_000
    await lose_gateway(engine, clock, reservations=2)
    assert (await operator.funds(ACCOUNT)).balance_nano == 10_000_000
    await check_books(store)

    settlement = await settle(engine, cheaper, 22_000_000)
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (20_000_000, 2_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.balance_nano, funds.balance_held_nano) == (18_000_000, 0)
    settlement = await settle(engine, dearer, 60_000_000)
    assert (settlement.from_balance_nano, settlement.written_off_nano) == (48_000_000, 12_000_000)
    assert (await operator.funds(ACCOUNT)).balance_nano == 0
    await check_books(store)


async def test_a_late_settlement_of_what_was_seen_beyond_everything(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await extend(engine, held, 0, seen=130_000_000)
    await lose_gateway(engine, clock)
    _, _, postings = await last_entry(store)
    assert postings["written_off"] == 30_000_000
    settlement = await settle(engine, held, 90_000_000)
    assert (settlement.from_allowance_nano, settlement.written_off_nano) == (90_000_000, 0)
    assert (await operator.funds(ACCOUNT)).used_nano == 90_000_000
    await check_books(store)


async def test_at_a_rate_a_lost_hold_is_charged_as_it_was_held(
    engine: CreditEngine, operator: Operator, store: Store, clock: MovableClock
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, "cheap")
    await hold(engine, identity, 40_000_001)
    await lose_gateway(engine, clock)
    assert (await operator.funds(ACCOUNT)).used_nano == 36_000_001
    await check_books(store)


async def test_a_gateway_that_dies_over_the_end_of_a_window_is_charged_in_the_window_of_its_hold(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await extend(engine, held, 0, seen=15_000_000)
    clock.move(DAY_MS)
    await spend(engine, acme, 1)
    assert await engine.expire_due(SHARD) == 1
    _, _, postings = await last_entry(store)
    book = str(DAY_MS)
    assert postings == {f"before:{book}": -40_000_000, f"used:{book}": 15_000_000, f"lapsed:{book}": 25_000_000}
    await check_books(store)
    # What the hold left over has lapsed: the window of now pays what it cost beyond what was seen.
    settlement = await settle(engine, held, 18_000_000)
    assert settlement.from_allowance_nano == 18_000_000
    await check_books(store)
    assert (await operator.funds(ACCOUNT)).used_nano == 3_000_001


async def test_a_hold_of_yesterday_that_ends_with_nothing_seen_lapses_by_name(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    clock.move(DAY_MS)
    await spend(engine, acme, 1)
    assert await engine.expire_due(SHARD) == 1
    kind, id_, postings = await last_entry(store)
    assert (kind, id_, postings) == (
        *("lapse", held.id),
        {f"before:{DAY_MS}": -40_000_000, f"lapsed:{DAY_MS}": 40_000_000},
    )
    await check_books(store)


async def test_those_of_a_gateway_known_to_be_gone_are_charged_what_was_seen_at_once(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await extend(engine, held, 0, seen=15_000_000)
    clock.move(1)
    assert await operator.abandon_orphans(await operator.now_ms()) == 1
    assert (await operator.funds(ACCOUNT)).used_nano == 15_000_000
    assert await operator.abandon_orphans(await operator.now_ms()) == 0
    await check_books(store)


async def test_a_void_after_the_lease_ran_out_gives_back_what_was_charged(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    await operator.credit(ACCOUNT, 20_000_000, "grant")
    held = await hold(engine, acme, 110_000_000)
    await extend(engine, held, 0, seen=130_000_000)
    await lose_gateway(engine, clock)
    assert (await operator.funds(ACCOUNT)).balance_nano == 0
    assert (await operator.void_reservation(held.id)).cost_nano == 0
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano, funds.balance_nano, funds.balance_held_nano) == (0, 0, 20_000_000, 0)
    kind, id_, postings = await last_entry(store)
    assert (kind, id_, postings["balance"], postings["written_off"]) == ("void", held.id, 20_000_000, -10_000_000)
    await check_books(store)
    assert (await operator.void_reservation(held.id)).repeated
    assert (await settle(engine, held, 9)).state == "voided"
    await check_books(store)


async def test_a_void_is_free_whatever_was_seen(
    engine: CreditEngine, operator: Operator, store: Store, clock: MovableClock
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, "hold")
    held = await hold(engine, identity, 40_000_000)
    await extend(engine, held, 0, seen=15_000_000)
    assert (await operator.void_reservation(held.id)).cost_nano == 0
    assert (await operator.funds(ACCOUNT)).used_nano == 0
    assert (await settle(engine, held, 9)).state == "voided"
    await check_books(store)


async def test_an_expired_reservation_is_settled_for_a_day_and_then_forgotten(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    other = await hold(engine, acme, 10_000_000)
    await lose_gateway(engine, clock, reservations=2)
    clock.move(DAY_MS - 1)
    assert await engine.expire_due(SHARD) == 0
    assert (await settle(engine, held, 5)).state == "settled"
    clock.move(1)
    await engine.expire_due(SHARD)
    with pytest.raises(UnknownReservation):
        await settle(engine, other, 5)
    await check_books(store)


async def test_what_was_seen_never_goes_down_when_calls_overtake_each_other(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    for seen in (20_000_000, 15_000_000):
        await scripts.extend(
            store,
            ACCOUNT,
            held.id,
            plan=PLANS["seen"],
            wanted=Cost(0, 0),
            seen=Cost(seen, seen),
            seen_note=str(seen),
            lease_ms=LEASE_MS,
        )
    await lose_gateway(engine, clock)
    assert (await operator.funds(ACCOUNT)).used_nano == 20_000_000
    assert (await ledger(store))[-1]["note"] == "20000000"


@pytest.mark.parametrize("verb", ["void", "expire", "abandon"])
async def test_nothing_is_ended_for_an_account_or_a_reservation_that_is_not_there(
    store: Store, engine: CreditEngine, operator: Operator, acme: Identity, verb: str
) -> None:
    held = await hold(engine, acme, 1_000)
    with pytest.raises(UnknownAccount):
        await scripts.release(store, "nobody", held.id, verb)  # type: ignore[arg-type]
    with pytest.raises(UnknownReservation):
        await scripts.release(store, ACCOUNT, "rsv_00ffffffffffffffffffffffff", verb)  # type: ignore[arg-type]
    assert (await operator.funds(ACCOUNT)).held_nano == 1_000
    await engine.void(held)


async def test_the_gateway_that_comes_back_takes_its_stream_to_the_end(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    """It was only away: what was charged meanwhile is held again, and its own word on the cost is the last."""
    await operator.credit(ACCOUNT, 20_000_000, "grant")
    held = await hold(engine, acme, 105_000_000)
    await extend(engine, held, 0, seen=130_000_000)
    await lose_gateway(engine, clock)
    await extend(engine, held, 110_000_000, seen=131_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano, funds.balance_nano, funds.balance_held_nano) == (
        *(0, 100_000_000),
        *(20_000_000, 20_000_000),
    )
    kind, id_, postings = await last_entry(store)
    assert (kind, id_, postings["written_off"]) == ("reopen", held.id, -10_000_000)
    assert ((await ledger(store))[-1]["model"], (await ledger(store))[-1]["key"]) == ("model", acme.key_id)
    await check_books(store)
    clock.move(LEASE_MS - 1)
    assert await engine.expire_due(SHARD) == 0
    assert (await settle(engine, held, 61_000_000)).from_allowance_nano == 61_000_000
    assert engine.open_reservations == 0
    await check_books(store)


async def test_one_that_is_opened_again_grows_from_what_it_was_charged(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await extend(engine, held, 0, seen=15_000_000)
    await lose_gateway(engine, clock)
    other = await hold(engine, acme, 70_000_000)
    await extend(engine, held, 40_000_000, seen=15_000_000)
    assert (await operator.funds(ACCOUNT)).held_nano == 100_000_000  # 15 again, and 15 more that were free
    await engine.void(other)
    await extend(engine, held, 60_000_000, seen=15_000_000)
    assert (await operator.funds(ACCOUNT)).held_nano == 60_000_000
    await lose_gateway(engine, clock)
    assert (await operator.funds(ACCOUNT)).used_nano == 15_000_000
    await check_books(store)


@pytest.mark.parametrize("skew_ms", [60_001, -60_001])
async def test_a_store_whose_clock_has_jumped_ends_nobodys_lease(
    engine: CreditEngine,
    operator: Operator,
    acme: Identity,
    clock: MovableClock,
    monkeypatch: pytest.MonkeyPatch,
    skew_ms: int,
) -> None:
    await hold(engine, acme, 1_000)
    clock.move(LEASE_MS)
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() + skew_ms)
    assert await engine.expire_due(SHARD) == 0
    assert (await operator.funds(ACCOUNT)).held_nano == 1_000
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() + skew_ms // 2)
    assert await engine.expire_due(SHARD) == 1


async def test_a_voided_reservation_is_forgotten_after_an_hour(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 1_000)
    await engine.void(held)
    clock.move(HOUR_MS - 1)
    await engine.expire_due(SHARD)
    assert (await operator.void_reservation(held.id)).repeated
    clock.move(1)
    await engine.expire_due(SHARD)
    with pytest.raises(UnknownReservation):
        await operator.void_reservation(held.id)
