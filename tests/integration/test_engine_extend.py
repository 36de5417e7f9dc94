"""A hold that grows while its answer streams: what it takes, and what it never gives back before the end."""

from dataclasses import replace

import pytest

from gateway.credits import scripts
from gateway.credits.errors import StoreUnavailable
from gateway.credits.operator import Operator
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Reservation, Seen
from gateway.credits.store import Store
from gateway.domain.decision import Denied
from gateway.domain.plan import DAY_MS
from tests.conftest import PLANS, TimedServer
from tests.engine_calls import (
    ACCOUNT,
    CREDIT,
    HOUR_MS,
    SHARD,
    check_books,
    denial,
    extend,
    hold,
    ledger,
    lose_record,
    new_identity,
    reserve,
    settle,
    spend,
)
from tests.servers import MovableClock


def figures(held: Reservation) -> tuple[int, int, int]:
    """What a hold covers, and where that comes from."""
    return held.reserved.payg_nano, held.reserved.from_allowance_nano, held.reserved.from_balance_nano


async def test_a_hold_grows_from_the_allowance_and_then_from_prepaid_credits(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held = await hold(engine, acme, 20_000_000)
    assert figures(await extend(engine, held, 90_000_000)) == (90_000_000, 90_000_000, 0)
    assert figures(await extend(engine, held, 130_000_000)) == (130_000_000, 100_000_000, 30_000_000)
    assert figures(await extend(engine, held, 140_000_000)) == (140_000_000, 100_000_000, 40_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.held_nano, funds.balance_held_nano) == (100_000_000, 40_000_000)
    await check_books(store)

    settlement = await settle(engine, held, 120_000_000)
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (100_000_000, 20_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.held_nano, funds.balance_held_nano, funds.balance_nano) == (0, 0, 30_000_000)
    await check_books(store)


async def test_where_credits_run_short_it_covers_what_there_was(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 5_000_000, "grant")
    held = await hold(engine, acme, 20_000_000)
    other = await hold(engine, acme, 30_000_000)
    assert figures(await extend(engine, held, CREDIT)) == (75_000_000, 70_000_000, 5_000_000)
    assert (await denial(engine, acme, 1)).reason == "credits_in_flight"
    # What another request gives back can be had later.
    await engine.void(other)
    assert figures(await extend(engine, held, 90_000_000)) == (90_000_000, 85_000_000, 5_000_000)
    await check_books(store)
    await engine.void(held)


async def test_a_hold_never_shrinks_and_a_repeat_changes_nothing(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    held = await hold(engine, acme, 60_000_000)
    for nano in (60_000_000, 10_000_000, 0, 80_000_000, 80_000_000, 60_000_000):
        await extend(engine, held, nano)
    assert figures(held) == (80_000_000, 80_000_000, 0)
    assert (await operator.funds(ACCOUNT)).held_nano == 80_000_000
    await engine.void(held)
    assert (await operator.funds(ACCOUNT)).held_nano == 0


async def test_extending_renews_the_lease_and_never_shortens_it(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 1_000)
    patient = await hold(engine, acme, 1_000, lease_ms=HOUR_MS)
    clock.move(LEASE_MS - 1)
    await extend(engine, held, 2_000)
    await extend(engine, patient, 2_000)
    clock.move(LEASE_MS - 1)
    assert await engine.expire_due(SHARD) == 0
    clock.move(1)
    assert await engine.expire_due(SHARD) == 1
    assert [one.id for one in await operator.reservations()] == [patient.id]
    await engine.void(patient)


async def test_it_grows_at_the_rate_it_was_made_at(engine: CreditEngine, operator: Operator, store: Store) -> None:
    """A hold that the allowance pays alone is rounded once, however often it grows."""
    dev = await new_identity(operator, engine, ACCOUNT, "developer")
    held = await hold(engine, dev, 1)
    dearer = {**PLANS, "developer": replace(PLANS["developer"], rate_ppm=1_000_000)}
    engine.use(dearer, "standard")
    for nano in (2, 5, 12, 1_000_000_001):
        await extend(engine, held, nano)
        assert figures(held) == (nano, -(-nano * 9 // 10), 0)
    settlement = await settle(engine, held, 1_000_000_001)
    assert settlement.from_allowance_nano == 900_000_001
    await check_books(store)


async def test_an_amount_that_costs_exactly_what_is_held_at_the_rate_needs_no_balance(
    engine: CreditEngine, operator: Operator, store: Store
) -> None:
    """11.111111 nano-credits are 12 at list price and 10 at the rate of 0.9, although 10 would only pay 11 of 12."""
    dev = await new_identity(operator, engine, ACCOUNT, "developer")
    await operator.credit(ACCOUNT, 10_000, "grant")
    held = await hold(engine, dev, 1)
    assert figures(await engine.extend(held, 11_111_111, Seen())) == (12, 10, 0)
    assert (await engine.settle(held, 11_111_111, "")).from_allowance_nano == 10
    await check_books(store)


async def test_at_a_rate_the_balance_holds_what_the_allowance_leaves_at_list_price(
    engine: CreditEngine, operator: Operator, store: Store
) -> None:
    dev = await new_identity(operator, engine, ACCOUNT, "developer")
    await operator.credit(ACCOUNT, 10_000, "grant")
    left = 9_000
    await spend(engine, dev, ((await operator.funds(ACCOUNT)).granted_nano - left) * 10 // 9)
    blocking = await hold(engine, dev, 5_000)
    held = await hold(engine, dev, 6_000)  # 4,500 of the allowance pay 5,000 of it
    assert figures(held) == (6_000, 4_500, 1_000)
    await engine.void(blocking)
    # 4,500 that came free pay 5,000 more before the balance is asked again.
    assert figures(await extend(engine, held, 11_500)) == (11_500, 9_000, 1_500)
    assert figures(await extend(engine, held, 30_000)) == (20_000, 9_000, 10_000)
    settlement = await settle(engine, held, 13_000)
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (9_000, 3_000)
    await check_books(store)


async def test_a_stream_that_goes_on_into_the_next_window_holds_credits_of_both(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 70_000_000)
    clock.move(DAY_MS)
    assert figures(await extend(engine, held, 120_000_000)) == (120_000_000, 120_000_000, 0)
    funds = await operator.funds(ACCOUNT)
    assert (funds.granted_nano, funds.held_nano, funds.used_nano) == (100_000_000, 50_000_000, 0)
    await check_books(store)

    # The credits of the day before pay first: they lapse otherwise.
    settlement = await settle(engine, held, 80_000_000)
    assert settlement.from_allowance_nano == 80_000_000
    funds = await operator.funds(ACCOUNT)
    assert (funds.held_nano, funds.used_nano) == (0, 10_000_000)
    await check_books(store)


async def test_both_windows_are_given_back_by_a_void(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 70_000_000)
    clock.move(DAY_MS)
    for nano in (120_000_000, 130_000_000):
        await extend(engine, held, nano)
    await engine.void(held)
    funds = await operator.funds(ACCOUNT)
    assert (funds.allowance_remaining_nano, funds.held_nano) == (100_000_000, 0)
    assert (await ledger(store))[-1]["kind"] == "lapse"
    await check_books(store)


async def test_without_prepaid_credits_in_its_plan_a_hold_grows_from_the_allowance_alone(
    store: Store, engine: CreditEngine
) -> None:
    closed = {"closed": replace(PLANS["standard"], name="closed", payg=False)}
    operator = Operator(store, closed, "closed")
    engine.use(closed, "closed")
    identity = await new_identity(operator, engine, ACCOUNT, "closed")
    await operator.credit(ACCOUNT, CREDIT, "grant")
    held = await hold(engine, identity, 20_000_000)
    assert figures(await extend(engine, held, CREDIT)) == (100_000_000, 100_000_000, 0)
    await engine.void(held)


async def test_while_the_clocks_differ_a_hold_grows_from_the_balance_but_opens_no_window(
    engine: CreditEngine,
    operator: Operator,
    store: Store,
    acme: Identity,
    clock: MovableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held = await hold(engine, acme, 20_000_000)
    clock.move(DAY_MS)
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() + 60_001)
    assert figures(await extend(engine, held, 60_000_000)) == (60_000_000, 20_000_000, 40_000_000)
    assert figures(await extend(engine, held, 80_000_000)) == (70_000_000, 20_000_000, 50_000_000)
    assert [entry["kind"] for entry in await ledger(store)].count("refresh") == 1
    await check_books(store)
    await engine.void(held)


async def test_an_account_that_has_left_the_plan_grows_within_its_new_one(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    await operator.credit(ACCOUNT, CREDIT, "grant")
    held = await hold(engine, acme, 20_000_000)
    await operator.set_plan(ACCOUNT, "professional")
    assert figures(await extend(engine, held, 300_000_000)) == (300_000_000, 300_000_000, 0)
    clock.move(DAY_MS)  # a refresh is due, of a plan that this call does not know
    assert figures(await extend(engine, held, 400_000_000)) == (400_000_000, 300_000_000, 100_000_000)
    await check_books(store)
    settlement = await settle(engine, held, 400_000_000)
    assert settlement.written_off_nano == 0
    await check_books(store)


async def test_a_reservation_that_is_over_does_not_grow(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    held = await hold(engine, acme, 20_000_000)
    await operator.void_reservation(held.id)
    assert figures(await extend(engine, held, 60_000_000)) == (20_000_000, 20_000_000, 0)
    funds = await operator.funds(ACCOUNT)
    assert (funds.held_nano, funds.used_nano) == (0, 0)
    assert (await settle(engine, held, 30_000_000)).state == "voided"


async def test_a_reservation_that_the_store_has_lost_is_held_again(
    engine: CreditEngine, store: Store, acme: Identity
) -> None:
    held = await hold(engine, acme, 20_000_000)
    await lose_record(store, held.id)
    await extend(engine, held, 60_000_000)
    assert figures(held) == (60_000_000, 60_000_000, 0)
    assert (await settle(engine, held, 60_000_000)).cost_nano == 60_000_000


async def test_a_store_that_does_not_answer_leaves_the_hold_as_it_was(
    engine: CreditEngine, operator: Operator, store: Store, valkey: TimedServer, acme: Identity
) -> None:
    held = await hold(engine, acme, 20_000_000)
    valkey.server.command("CLIENT", "KILL", "TYPE", "normal")
    with pytest.raises(StoreUnavailable):
        await extend(engine, held, 60_000_000)
    assert figures(held) == (20_000_000, 20_000_000, 0)
    assert await store.wait_connected(30)
    await extend(engine, held, 60_000_000)
    assert figures(held) == (60_000_000, 60_000_000, 0)
    assert (await operator.funds(ACCOUNT)).held_nano == 60_000_000
    await engine.void(held)


# --- beside each other ----------------------------------------------------------------------------------------------


async def test_one_that_will_grow_leaves_an_eighth_of_what_others_hold(engine: CreditEngine, acme: Identity) -> None:
    await hold(engine, acme, 80_000_000)
    # 20 million are free, of which 10 million are for the first one to grow.
    refused = await reserve(engine, acme, 10_000_001, grows=True)
    assert isinstance(refused, Denied)
    assert refused.reason == "credits_in_flight"
    admitted = await reserve(engine, acme, 10_000_000, grows=True)
    assert isinstance(admitted, Reservation)
    # The rest is for those that grow, and for any that will not.
    assert figures(await extend(engine, admitted, 20_000_000))[0] == 20_000_000


async def test_a_small_one_need_not_wait_for_the_end_of_large_ones(engine: CreditEngine, acme: Identity) -> None:
    await hold(engine, acme, 99_000_000)
    # An eighth of that is more than is free, but eight times as much as a small one holds is enough.
    assert isinstance(await reserve(engine, acme, 111_112, grows=True), Denied)
    assert isinstance(await reserve(engine, acme, 111_111, grows=True), Reservation)


async def test_prepaid_credits_that_a_plan_does_not_use_are_not_waited_for(
    engine: CreditEngine, store: Store, acme: Identity
) -> None:
    plans = {**PLANS, "closed": replace(PLANS["standard"], name="closed", payg=False)}
    engine.use(plans, "standard")
    operator = Operator(store, plans, "standard")
    await operator.set_plan(ACCOUNT, "payg")
    await operator.credit(ACCOUNT, 10 * CREDIT, "grant")
    await hold(engine, acme, 8 * CREDIT)
    await operator.set_plan(ACCOUNT, "closed")
    assert (await operator.funds(ACCOUNT)).balance_held_nano == 8 * CREDIT
    assert isinstance(await reserve(engine, acme, 50_000_000, grows=True), Reservation)
