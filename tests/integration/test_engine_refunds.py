"""Refunds of requests, and deductions: what comes back, and where to."""

import pytest

from gateway.credits.errors import OperationConflict, Rejected, UnknownAccount, UnknownReservation
from gateway.credits.keyspace import shard_of
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Identity
from gateway.credits.store import Store
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS
from tests.engine_calls import (
    ACCOUNT,
    CREDIT,
    SHARD,
    check_books,
    extend,
    hold,
    last_entry,
    ledger,
    lose_gateway,
    settle,
    spend,
)
from tests.servers import MovableClock

NEIGHBOUR = next(name for number in range(10_000) if shard_of(name := f"acme-{number}") == SHARD)


async def test_a_refund_goes_back_to_where_the_cost_came_from(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    other = await spend(engine, acme, 10_000_000)
    held = await spend(engine, acme, 120_000_000)
    given = await operator.refund_request(ACCOUNT, held.id, "ticket-7", "it was all wrong")
    assert (given.state, given.from_allowance_nano, given.from_balance_nano, given.repeated) == (
        *("refunded", 90_000_000, 30_000_000),
        False,
    )
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.balance_nano, funds.held_nano, funds.balance_held_nano) == (
        *(10_000_000, 50_000_000),
        *(0, 0),
    )
    kind, id_, postings = await last_entry(store)
    assert (kind, id_, (await ledger(store))[-1]["note"]) == (
        *("refund_request", "ticket-7"),
        '{"reason": "it was all wrong"}',
    )
    assert postings == {
        f"window:{DAY_MS}": 90_000_000,
        f"used:{DAY_MS}": -90_000_000,
        "balance": 30_000_000,
        "spent": -30_000_000,
    }
    await check_books(store)
    await spend(engine, acme, 90_000_000)  # and can be spent again
    assert (await operator.refund_request(ACCOUNT, other.id)).from_allowance_nano == 10_000_000
    await check_books(store)


async def test_allowance_of_a_window_that_is_over_has_lapsed(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held = await spend(engine, acme, 120_000_000)
    clock.move(DAY_MS // 2)
    await spend(engine, acme, 40_000_000)
    given = await operator.refund_request(ACCOUNT, held.id)
    assert (given.from_allowance_nano, given.from_balance_nano) == (100_000_000, 20_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.balance_nano) == (40_000_000, 50_000_000)
    _, _, postings = await last_entry(store)
    assert (postings[f"used:{DAY_MS}"], postings[f"lapsed:{DAY_MS}"]) == (-100_000_000, 100_000_000)
    await check_books(store)


async def test_a_refund_after_midnight_does_not_make_today_look_less_used(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await spend(engine, acme, 60_000_000)
    clock.move(DAY_MS // 2)
    await spend(engine, acme, 30_000_000)
    await operator.refund_request(ACCOUNT, held.id)
    for plan in ("payg", "developer", "payg", "standard"):
        await operator.set_plan(ACCOUNT, plan)
    assert (await operator.funds(ACCOUNT)).used_nano == 30_000_000
    await check_books(store)


async def test_a_refund_of_today_counts_for_the_windows_that_are_opened_today(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    held = await spend(engine, acme, 60_000_000)
    await spend(engine, acme, 30_000_000)
    await operator.refund_request(ACCOUNT, held.id)
    for plan in ("payg", "developer"):
        await operator.set_plan(ACCOUNT, plan)
    assert (await operator.funds(ACCOUNT)).used_nano == 30_000_000
    await check_books(store)


async def test_a_refund_happens_once_under_whichever_operation(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    held, other = await spend(engine, acme, 20_000_000), await spend(engine, acme, 5_000_000)
    await operator.refund_request(ACCOUNT, held.id, "ticket-7")
    for operation in ("ticket-7", "ticket-8"):
        again = await operator.refund_request(ACCOUNT, held.id, operation)
        assert (again.state, again.from_allowance_nano, again.repeated) == ("refunded", 20_000_000, True)
    with pytest.raises(OperationConflict):
        await operator.refund_request(ACCOUNT, other.id, "ticket-7")
    with pytest.raises(OperationConflict):
        await operator.credit(ACCOUNT, 1, "grant", "ticket-7")
    assert (await operator.funds(ACCOUNT)).used_nano == 5_000_000
    assert [entry["kind"] for entry in await ledger(store)].count("refund_request") == 1
    assert (await settle(engine, held, 1)).state == "refunded"
    await check_books(store)


async def test_only_what_was_charged_can_be_refunded(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    held, voided = await hold(engine, acme, 20_000_000), await hold(engine, acme, 1)
    await engine.void(voided)
    for reservation, state in ((held, "open"), (voided, "voided")):
        with pytest.raises(Rejected, match=f"is {state}: only what was charged can be refunded"):
            await operator.refund_request(ACCOUNT, reservation.id)
    await settle(engine, held, 5)
    await operator.create_account(NEIGHBOUR)
    with pytest.raises(UnknownReservation):
        await operator.refund_request(NEIGHBOUR, held.id)
    with pytest.raises(UnknownReservation):
        await operator.refund_request(ACCOUNT, "rsv_00ffffffffffffffffffffffff")
    with pytest.raises(UnknownAccount):
        await operator.refund_request("nobody", held.id)
    assert (await operator.funds(ACCOUNT)).used_nano == 5
    await check_books(store)


async def test_what_a_lost_gateways_request_was_charged_can_be_refunded(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await extend(engine, held, 0, seen=130_000_000)
    await lose_gateway(engine, clock)
    given = await operator.refund_request(ACCOUNT, held.id)
    assert (given.from_allowance_nano, given.written_off_nano) == (100_000_000, 30_000_000)
    _, _, postings = await last_entry(store)
    assert (postings["unpaid"], postings["written_off"]) == (30_000_000, -30_000_000)
    assert (await operator.funds(ACCOUNT)).used_nano == 0
    # Its gateway's late word on the cost changes nothing any more.
    assert (await settle(engine, held, 5)).state == "refunded"
    assert (await operator.funds(ACCOUNT)).used_nano == 0
    await check_books(store)


async def test_a_refund_is_remembered_for_a_day_and_its_operation_for_longer(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await spend(engine, acme, 5)
    clock.move(DAY_MS - 1)
    await operator.refund_request(ACCOUNT, held.id, "ticket-7")
    clock.move(DAY_MS - 1)
    await engine.expire_due(SHARD)
    assert (await operator.refund_request(ACCOUNT, held.id, "ticket-8")).repeated
    clock.move(1)
    await engine.expire_due(SHARD)
    with pytest.raises(UnknownReservation):
        await operator.refund_request(ACCOUNT, held.id, "ticket-7")
    with pytest.raises(OperationConflict):
        await operator.refund_request(ACCOUNT, "rsv_00ffffffffffffffffffffffff", "ticket-7")


async def test_a_deduction_takes_what_nothing_holds(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held = await hold(engine, acme, 120_000_000)
    with pytest.raises(Rejected, match=r"at most 0\.03 credits are neither spent nor held"):
        await operator.credit(ACCOUNT, 30_000_001, "deduct")
    assert await operator.credit(ACCOUNT, 30_000_000, "deduct", "fix-1", "given twice") == (20_000_000, False)
    assert await operator.credit(ACCOUNT, 30_000_000, "deduct", "fix-1") == (20_000_000, True)
    with pytest.raises(OperationConflict):
        await operator.credit(ACCOUNT, 30_000_000, "grant", "fix-1")
    assert await last_entry(store) == ("deduct", "fix-1", {"balance": -30_000_000, "deducted": 30_000_000})
    await check_books(store)
    assert (await settle(engine, held, 120_000_000)).from_balance_nano == 20_000_000
    await check_books(store)


async def test_a_balance_has_a_limit_and_says_how_much_room_there_is(
    operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, MAX_NANO - CREDIT, "grant")
    with pytest.raises(Rejected, match="room for 1 credits more"):
        await operator.credit(ACCOUNT, CREDIT + 1, "grant")
    assert await operator.credit(ACCOUNT, CREDIT, "grant") == (MAX_NANO, False)
    # Taking away needs no room.
    assert await operator.credit(ACCOUNT, CREDIT, "deduct") == (MAX_NANO - CREDIT, False)
    await check_books(store)


@pytest.mark.parametrize("operation", ["grant", "refund", "plan"])
async def test_an_accounts_time_never_goes_behind_an_operation(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock, operation: str
) -> None:
    held = await spend(engine, acme, 5)
    clock.move(1_000)
    seen_ms = clock.now_ms()
    match operation:
        case "grant":
            await operator.credit(ACCOUNT, 1, "grant")
        case "refund":
            await operator.refund_request(ACCOUNT, held.id)
        case _:
            await operator.set_plan(ACCOUNT, "professional")
    clock.move(-1_000)
    assert (await operator.funds(ACCOUNT)).now_ms == seen_ms


async def test_no_request_is_refunded_with_prepaid_credits_that_came_back_before(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held, free = await spend(engine, acme, 130_000_000), await spend(engine, acme, 5_000_000)
    await operator.credit(ACCOUNT, 10_000_000, "refund")
    with pytest.raises(Rejected, match=r"at most 0\.025 credits were charged to the balance and not refunded"):
        await operator.refund_request(ACCOUNT, held.id)
    assert (await operator.refund_request(ACCOUNT, free.id)).from_balance_nano == 5_000_000
    assert (await operator.funds(ACCOUNT)).balance_nano == 30_000_000
    await check_books(store)
