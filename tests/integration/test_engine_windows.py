"""Plans with several windows at once: what each counts, which decides, and what happens when they change."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from gateway.credits import scripts
from gateway.credits.errors import Rejected
from gateway.credits.keyspace import account_key
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity
from gateway.credits.store import Store
from gateway.domain.decision import Funds
from gateway.domain.plan import DAY_MS, Allowance, Plan
from tests.conftest import START_MS
from tests.engine_calls import (
    ACCOUNT,
    CREDIT,
    HOUR_MS,
    check_books,
    denial,
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

SHIFT_MS = 8 * HOUR_MS
BURST = Allowance("per_window", 300, HOUR_MS)
SHIFT = Allowance("per_window", 1_000, SHIFT_MS)
DAY = Allowance("per_window", 2_000, DAY_MS)
PLANS = {
    plan.name: plan
    for plan in (
        Plan("guarded", (SHIFT, DAY)),
        Plan("bursty", (BURST, SHIFT, DAY)),
        Plan("daily", (DAY,)),
        Plan("shifts", (SHIFT,)),
        Plan("payg"),
    )
}
#: The test begins half an hour into an hour, four and a half hours into a shift.
NEXT_SHIFT_MS = START_MS - START_MS % SHIFT_MS + SHIFT_MS
NEXT_DAY_MS = START_MS - START_MS % DAY_MS + DAY_MS


@pytest.fixture
def plans() -> Mapping[str, Plan]:
    """Of the default one, 1,000 nano-credits per shift of eight hours, and 2,000 a day."""
    return PLANS


def used(funds: Funds) -> list[int]:
    """What was used of each window, in the plan's order."""
    return [window.used_nano for window in funds.windows]


def held(funds: Funds) -> list[int]:
    """What is held of each window, in the plan's order."""
    return [window.held_nano for window in funds.windows]


async def reconfigure(engine: CreditEngine, store: Store, *allowances: Allowance) -> Operator:
    """The plan's windows are others from now on."""
    plans = {**PLANS, "guarded": replace(PLANS["guarded"], allowances=allowances)}
    engine.use(plans, "guarded")
    return Operator(store, plans, "guarded")


async def test_every_charge_counts_in_all_windows_and_the_tightest_decides(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    await spend(engine, acme, 900)
    funds = await operator.funds(ACCOUNT)
    assert used(funds) == [900, 900]
    assert (funds.allowance_remaining_nano, funds.resets_at_ms) == (100, NEXT_SHIFT_MS)
    denied = await denial(engine, acme, 101)
    assert (denied.reason, denied.funds.resets_at_ms) == ("allowance_spent", NEXT_SHIFT_MS)

    clock.freeze_at(NEXT_SHIFT_MS)
    assert used(await operator.funds(ACCOUNT)) == [0, 900]
    await spend(engine, acme, 1_000)
    clock.move(HOUR_MS)
    assert (await denial(engine, acme, 101)).funds.resets_at_ms == NEXT_SHIFT_MS + SHIFT_MS  # both of them
    await check_books(store)
    assert used(await operator.funds(ACCOUNT)) == [1_000, 1_900]

    clock.freeze_at(NEXT_DAY_MS)
    assert used(await operator.funds(ACCOUNT)) == [0, 0]
    await spend(engine, acme, 1_000)
    await check_books(store)


async def test_the_longer_window_decides_when_it_has_less_left(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    clock.freeze_at(NEXT_DAY_MS)
    await spend(engine, acme, 1_000)
    clock.move(SHIFT_MS)
    await spend(engine, acme, 950)
    clock.move(SHIFT_MS)
    funds = await operator.funds(ACCOUNT)
    assert used(funds) == [0, 1_950]
    assert (funds.allowance_remaining_nano, funds.granted_nano) == (50, 2_000)
    partly = await hold(engine, acme, 1_000, minimum=1)
    assert partly.reserved.from_allowance_nano == 50
    await engine.void(partly)


async def test_prepaid_credits_pay_what_the_tightest_window_cannot(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, CREDIT, "grant")
    one = await hold(engine, acme, 1_500)
    assert (one.reserved.from_allowance_nano, one.reserved.from_balance_nano) == (1_000, 500)
    assert held(await operator.funds(ACCOUNT)) == [1_000, 1_000]
    settlement = await settle(engine, one, 1_200)
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (1_000, 200)
    assert used(await operator.funds(ACCOUNT)) == [1_000, 1_000]
    await check_books(store)


async def test_a_hold_across_the_end_of_one_window_is_charged_in_those_that_still_last(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    one = await hold(engine, acme, 800, lease_ms=DAY_MS)
    clock.freeze_at(NEXT_SHIFT_MS)
    await engine.void(await hold(engine, acme, 1_000))  # opens the next shift: all of it is free
    assert held(await operator.funds(ACCOUNT)) == [0, 800]
    await check_books(store)
    settlement = await settle(engine, one, 500)
    assert settlement.from_allowance_nano == 500
    kind, _, postings = await last_entry(store)
    assert (kind, postings) == (
        "settle",
        {
            f"before:{SHIFT_MS}": -800,
            f"used:{SHIFT_MS}": 500,
            f"lapsed:{SHIFT_MS}": 300,
            f"window:{DAY_MS}": -500,
            f"used:{DAY_MS}": 500,
        },
    )
    assert used(await operator.funds(ACCOUNT)) == [0, 500]
    await check_books(store)


async def test_beyond_a_hold_of_an_ended_window_the_windows_of_now_pay(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    one = await hold(engine, acme, 800, lease_ms=DAY_MS)
    clock.freeze_at(NEXT_SHIFT_MS)
    await spend(engine, acme, 1)
    settlement = await settle(engine, one, 900)
    assert (settlement.from_allowance_nano, settlement.written_off_nano) == (900, 0)
    assert used(await operator.funds(ACCOUNT)) == [101, 901]
    await check_books(store)


@pytest.mark.parametrize("order", [(SHIFT,), (DAY,), (DAY, SHIFT), (BURST, SHIFT, DAY), (DAY, BURST), (BURST,)])
async def test_a_live_change_of_a_plans_windows_resets_nobodys_usage(
    engine: CreditEngine, store: Store, acme: Identity, order: tuple[Allowance, ...]
) -> None:
    await spend(engine, acme, 250)
    changed = await reconfigure(engine, store, *order)
    assert used(await changed.funds(ACCOUNT)) == [250] * len(order)
    await spend(engine, acme, 40)
    assert [window.refresh_ms for window in (await changed.funds(ACCOUNT)).windows] == [one.refresh_ms for one in order]
    await check_books(store)
    back = await reconfigure(engine, store, SHIFT, DAY)
    assert used(await back.funds(ACCOUNT)) == [290, 290]
    await spend(engine, acme, 10)
    await check_books(store)


async def test_what_is_held_stays_held_through_a_change_of_windows(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    one = await hold(engine, acme, 200)
    other = await hold(engine, acme, 50)
    changed = await reconfigure(engine, store, BURST)
    assert (await denial(engine, acme, 51)).reason == "credits_in_flight"
    third = await hold(engine, acme, 50)
    assert held(await changed.funds(ACCOUNT)) == [300]
    await check_books(store)
    # Once more, while the first change's holds are in flight.
    again = await reconfigure(engine, store, SHIFT, DAY)
    await spend(engine, acme, 1)
    assert held(await again.funds(ACCOUNT)) == [300, 300]
    for request, cost in ((one, 150), (other, 50), (third, 20)):
        assert (await settle(engine, request, cost)).from_allowance_nano == cost
        await check_books(store)
    assert held(await again.funds(ACCOUNT)) == [0, 0]


async def test_a_new_window_counts_no_more_than_the_day_or_a_longer_window_that_began_with_it(
    engine: CreditEngine, store: Store, acme: Identity, clock: MovableClock
) -> None:
    clock.freeze_at(NEXT_DAY_MS)
    await spend(engine, acme, 600)
    clock.move(SHIFT_MS)
    await spend(engine, acme, 70)
    # Used in the day: 670; in the shift: 70. An hour within that shift has seen 70 at the most.
    changed = await reconfigure(engine, store, BURST, SHIFT, DAY)
    assert used(await changed.funds(ACCOUNT)) == [70, 70, 670]
    await spend(engine, acme, 5)
    await check_books(store)
    clock.move(HOUR_MS)
    assert used(await changed.funds(ACCOUNT)) == [0, 75, 675]
    # A day that is opened now has seen all that was used today.
    await reconfigure(engine, store, BURST)
    await spend(engine, acme, 3)
    back = await reconfigure(engine, store, BURST, DAY)
    assert used(await back.funds(ACCOUNT)) == [3, 678]


async def test_a_window_that_is_closed_and_opened_again_does_not_know_the_holds_of_its_first_life(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    one = await hold(engine, acme, 400, lease_ms=3 * DAY_MS)
    clock.freeze_at(NEXT_SHIFT_MS)
    await spend(engine, acme, 1)
    await reconfigure(engine, store, DAY)
    await spend(engine, acme, 1)  # the shift is closed: what was held before it lapses
    assert [entry["kind"] for entry in await ledger(store)].count("close") == 1
    await check_books(store)
    await reconfigure(engine, store, SHIFT, DAY)
    await spend(engine, acme, 1)
    await check_books(store)
    settlement = await settle(engine, one, 300)
    assert settlement.from_allowance_nano == 300
    await check_books(store)


async def test_a_plan_change_moves_what_is_in_flight_to_the_new_windows(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    await spend(engine, acme, 100)
    one = await hold(engine, acme, 200)
    funds = await operator.set_plan(ACCOUNT, "bursty")
    assert (used(funds), held(funds)) == ([100, 100, 100], [200, 200, 200])
    assert funds.allowance_remaining_nano == 0
    await check_books(store)
    await extend(engine, one, 250)
    assert one.reserved.payg_nano == 200  # the hour has no more
    settlement = await settle(engine, one, 150)
    assert settlement.from_allowance_nano == 150
    funds = await operator.funds(ACCOUNT)
    assert (used(funds), held(funds)) == ([250, 250, 250], [0, 0, 0])
    kind, _, _ = await last_entry(store)
    assert kind == "settle"
    await check_books(store)
    funds = await operator.set_plan(ACCOUNT, "payg")
    assert funds.windows == ()
    await check_books(store)
    assert used(await operator.set_plan(ACCOUNT, "daily")) == [250]


async def test_a_window_of_a_plan_that_was_left_twice_still_counts_the_holds_in_flight(
    engine: CreditEngine, operator: Operator, store: Store
) -> None:
    """The hold is older than both windows: the second new one takes it over from the first."""
    identity = await new_identity(operator, engine, ACCOUNT, "shifts")
    one = await hold(engine, identity, 600)
    for plan in ("daily", "shifts", "daily"):
        funds = await operator.set_plan(ACCOUNT, plan)
        assert held(funds) == [600]
        await check_books(store)
    assert (await settle(engine, one, 500)).from_allowance_nano == 500
    assert used(await operator.funds(ACCOUNT)) == [500]
    await check_books(store)


async def test_a_window_takes_over_what_was_held_in_it_and_what_that_one_had_taken_over(
    engine: CreditEngine, operator: Operator, store: Store
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, "shifts")
    old = await hold(engine, identity, 600)
    await operator.set_plan(ACCOUNT, "daily")
    new = await hold(engine, identity, 100)
    assert held(await operator.set_plan(ACCOUNT, "shifts")) == [700]
    await check_books(store)
    await settle(engine, new, 100)
    assert held(await operator.set_plan(ACCOUNT, "daily")) == [600]
    await settle(engine, old, 550)
    funds = await operator.funds(ACCOUNT)
    assert (used(funds), held(funds)) == ([650], [0])
    await check_books(store)


async def test_a_window_gives_back_no_more_than_it_has_seen_used(
    engine: CreditEngine, store: Store, acme: Identity, clock: MovableClock
) -> None:
    """It took the place of windows of which one had seen the charge, and another had not."""
    await reconfigure(engine, store, BURST, DAY)
    clock.freeze_at(NEXT_SHIFT_MS)
    lost = await hold(engine, acme, 100)
    await hold(engine, acme, 50, lease_ms=DAY_MS)
    await extend(engine, lost, 0, seen=80)
    await lose_gateway(engine, clock)
    clock.freeze_at(NEXT_SHIFT_MS + HOUR_MS)
    await hold(engine, acme, 1)
    changed = await reconfigure(engine, store, Allowance("per_window", 300, HOUR_MS // 2))
    await hold(engine, acme, 1)
    funds = await changed.funds(ACCOUNT)
    assert (used(funds), held(funds)) == ([0], [52])
    assert (await changed.void_reservation(lost.id)).cost_nano == 0
    funds = await changed.funds(ACCOUNT)
    assert (used(funds), held(funds)) == ([0], [52])
    await check_books(store)


async def test_no_refresh_is_made_by_a_plan_change_while_the_clocks_differ(
    operator: Operator, store: Store, acme: Identity, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() - 60_001)
    await operator.set_plan(ACCOUNT, "daily")  # no refresh is due
    clock.freeze_at(NEXT_DAY_MS)
    before = await store.call("HGETALL", account_key(ACCOUNT))
    with pytest.raises(Rejected, match="clocks of store and gateway differ"):
        await operator.set_plan(ACCOUNT, "shifts")
    assert await store.call("HGETALL", account_key(ACCOUNT)) == before


async def test_a_change_of_windows_is_written_by_the_next_request_and_shown_before_it(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await spend(engine, acme, 10)
    before = await ledger(store)
    changed = await reconfigure(engine, store, DAY, BURST)
    assert used(await changed.funds(ACCOUNT)) == [10, 10]
    assert await ledger(store) == before
    await spend(engine, acme, 5)
    added = (await ledger(store))[len(before) :]
    assert [(entry["kind"], entry["id"]) for entry in added[:2]] == [
        ("refresh", f"{HOUR_MS}:{START_MS - START_MS % HOUR_MS + HOUR_MS}"),
        ("close", str(SHIFT_MS)),
    ]
    assert added[0]["used_after"] == f"{DAY_MS}:10 {HOUR_MS}:10"
    assert added[-1]["used_after"] == f"{DAY_MS}:15 {HOUR_MS}:15"
