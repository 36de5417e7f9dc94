"""What the engine promises to those who use it, on a real store whose clock the tests move."""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from gateway.credits import reaper, scripts
from gateway.credits.api_keys import digest_of
from gateway.credits.errors import (
    EngineError,
    OperationConflict,
    Rejected,
    StoreUnavailable,
    UnknownAccount,
    UnknownPlan,
    UnknownReservation,
)
from gateway.credits.journal import Journal
from gateway.credits.keyspace import account_key, shard_keys
from gateway.credits.operator import Operator
from gateway.credits.reaper import reap
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, Reservation
from gateway.credits.store import Store
from gateway.domain.decision import Denied
from gateway.domain.plan import DAY_MS
from gateway.domain.price import FEMTO_PER_NANO
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS, START_MS, TimedServer
from tests.engine_calls import ACCOUNT, CREDIT, HOUR_MS, SHARD, denial, hold, ledger, new_identity, reserve
from tests.servers import MovableClock, ValkeyServer
from tests.stores import started_store

# --- who pays -------------------------------------------------------------------------------------------------------


async def test_the_allowance_pays_first_and_prepaid_credits_the_rest(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    held = await hold(engine, acme, 120_000_000)
    assert (held.reserved.from_allowance_nano, held.reserved.from_balance_nano) == (100_000_000, 20_000_000)
    assert held.reserved.source == "mixed"

    settlement = await engine.settle(held, 110_000_000 * FEMTO_PER_NANO, "")
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (100_000_000, 10_000_000)
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano, funds.balance_nano, funds.balance_held_nano) == (
        100_000_000,
        0,
        40_000_000,
        0,
    )


async def test_allowance_freed_since_is_used_before_the_balance(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 50_000_000, "grant")
    first = await hold(engine, acme, 100_000_000)
    second = await hold(engine, acme, 30_000_000)
    assert second.reserved.source == "payg"
    await engine.void(first)
    settlement = await engine.settle(second, 30_000_000 * FEMTO_PER_NANO, "")
    assert (settlement.from_allowance_nano, settlement.from_balance_nano) == (30_000_000, 0)


async def test_a_plans_rate_makes_the_allowance_last_longer(engine: CreditEngine, operator: Operator) -> None:
    identity = await new_identity(operator, engine, "dev", "developer")
    held = await hold(engine, identity, 1_000_000_001)
    assert held.reserved.from_allowance_nano == 900_000_001
    settlement = await engine.settle(held, 1_000_000_001 * FEMTO_PER_NANO, "")
    assert settlement.from_allowance_nano == 900_000_001


async def test_an_amount_that_costs_exactly_what_is_left_at_the_rate_is_paid_by_the_allowance_alone(
    engine: CreditEngine, operator: Operator
) -> None:
    """11.111111 nano-credits are 12 at list price and 10 at the rate of 0.9, although 10 would only pay 11 of 12."""
    identity = await new_identity(operator, engine, "dev", "developer")
    granted = (await operator.funds("dev")).granted_nano
    all_but_ten = await engine.reserve(
        identity, "0" * 24, "model", (granted - 10) * FEMTO_PER_NANO * 10 // 9, 0, LEASE_MS
    )
    assert isinstance(all_but_ten, Reservation)
    assert all_but_ten.reserved.funds.allowance_remaining_nano == 10
    last = await engine.reserve(identity, "1" * 24, "model", 11_111_111, 11_111_111, LEASE_MS)
    assert isinstance(last, Reservation)
    assert (last.reserved.payg_nano, last.reserved.from_allowance_nano) == (12, 10)


async def test_prepaid_credits_pay_the_list_price(engine: CreditEngine, operator: Operator) -> None:
    identity = await new_identity(operator, engine, "dev", "developer")
    await operator.credit("dev", 10 * CREDIT, "grant")
    granted = (await operator.funds("dev")).granted_nano
    held = await hold(engine, identity, granted * 10 // 9 + 5 * CREDIT)
    assert held.reserved.from_allowance_nano == granted
    assert held.reserved.from_balance_nano in {5 * CREDIT, 5 * CREDIT + 1}


async def test_a_cost_beyond_everything_is_written_off_and_the_balance_stays_above_zero(
    engine: CreditEngine, operator: Operator, acme: Identity, metrics: Metrics
) -> None:
    await operator.credit(ACCOUNT, 7_000_000, "grant")
    held = await hold(engine, acme, 10_000_000)
    settlement = await engine.settle(held, 500_000_000 * FEMTO_PER_NANO, "")
    assert settlement.from_allowance_nano == 100_000_000
    assert settlement.from_balance_nano == 7_000_000
    assert settlement.written_off_nano == 393_000_000
    assert settlement.cost_nano == 500_000_000
    assert (await operator.funds(ACCOUNT)).balance_nano == 0
    assert b"quota_gateway_written_off_credits_total 0.393" in metrics.expose(None)[0]


async def test_between_minimum_and_amount_whatever_is_free_is_held(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    held = await hold(engine, acme, 300_000_000, minimum=100_000_000)
    assert held.reserved.payg_nano == held.reserved.from_allowance_nano == 100_000_000
    await engine.void(held)
    assert (await denial(engine, acme, 300_000_000, minimum=100_000_001)).required_nano == 100_000_001
    assert (await operator.funds(ACCOUNT)).held_nano == 0


async def test_an_account_without_prepaid_credits_in_its_plan_spends_none(store: Store, engine: CreditEngine) -> None:
    closed = {"closed": replace(PLANS["standard"], name="closed", payg=False)}
    operator = Operator(store, closed, "closed")
    engine.use(closed, "closed")
    identity = await new_identity(operator, engine, ACCOUNT, "closed")
    await operator.credit(ACCOUNT, CREDIT, "grant")
    held = await hold(engine, identity, 100_000_000)
    settlement = await engine.settle(held, 150_000_000 * FEMTO_PER_NANO, "")
    assert (settlement.from_balance_nano, settlement.written_off_nano) == (0, 50_000_000)
    assert (await denial(engine, identity, 1)).reason == "allowance_spent"


# --- refusals -------------------------------------------------------------------------------------------------------


async def test_of_100_concurrent_requests_exactly_what_fits_is_admitted(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    outcomes = await asyncio.gather(*(reserve(engine, acme, 10_000_000) for _ in range(100)))
    admitted = [outcome for outcome in outcomes if isinstance(outcome, Reservation)]
    denied = [outcome for outcome in outcomes if isinstance(outcome, Denied)]
    assert (len(admitted), len(denied)) == (10, 90)
    assert {one.reason for one in denied} == {"credits_in_flight"}
    assert engine.open_reservations == 10

    await asyncio.gather(*(engine.settle(one, 10_000_000 * FEMTO_PER_NANO, "") for one in admitted))
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano, funds.granted_nano) == (100_000_000, 0, 100_000_000)
    assert engine.open_reservations == 0


async def test_an_engine_is_quiet_until_a_request_asks_and_a_moment_after(engine: CreditEngine, acme: Identity) -> None:
    assert engine.quiet
    before = time.perf_counter()
    held = await reserve(engine, acme, 10_000_000)
    assert isinstance(held, Reservation)
    quiet, took_s = engine.quiet, time.perf_counter() - before
    assert not quiet or took_s > 0.1  # where the machine stood still meanwhile
    await engine.settle(held, 0, "")
    async with asyncio.timeout(30):
        while not engine.quiet:
            await asyncio.sleep(0.01)


async def test_a_denial_says_what_the_matter_is(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    assert (await denial(engine, acme, 200_000_000)).reason == "exceeds_balance"

    held = await hold(engine, acme, 60_000_000)
    assert (await denial(engine, acme, 60_000_000)).reason == "credits_in_flight"
    await engine.settle(held, 60_000_000 * FEMTO_PER_NANO, "")
    spent = await denial(engine, acme, 60_000_000)
    assert spent.reason == "allowance_spent"
    assert spent.funds.resets_at_ms == START_MS - START_MS % DAY_MS + DAY_MS

    clock.freeze_at(spent.funds.resets_at_ms - 60_000)
    assert (await denial(engine, acme, 60_000_000)).reason == "refresh_soon"
    clock.move(60_000)
    assert isinstance(await reserve(engine, acme, 60_000_000), Reservation)

    broke = await new_identity(operator, engine, "broke", "payg")
    assert (await denial(engine, broke, 1)).reason == "no_credits"


async def test_a_denial_writes_nothing(engine: CreditEngine, store: Store, acme: Identity, clock: MovableClock) -> None:
    clock.move(3 * DAY_MS)  # the refresh that the denial sees must not be written either
    before = await store.call("HGETALL", account_key(ACCOUNT)), await ledger(store)
    denied = await denial(engine, acme, 100_000_001)
    assert denied.funds.used_nano == 0
    assert (await store.call("HGETALL", account_key(ACCOUNT)), await ledger(store)) == before
    assert await store.call("HLEN", shard_keys(SHARD).records) == 1  # the shard's own mark


async def test_an_unknown_account_is_refused_and_not_made(engine: CreditEngine, operator: Operator) -> None:
    assert isinstance(await reserve(engine, Identity("nobody", ""), 1), Refused)
    assert await operator.accounts() == []
    with pytest.raises(UnknownAccount):
        await operator.funds("nobody")
    with pytest.raises(UnknownAccount):
        await operator.credit("nobody", 1, "grant")


async def test_an_account_on_a_plan_that_was_taken_out_of_the_configuration(
    engine: CreditEngine, acme: Identity
) -> None:
    poorer = {name: plan for name, plan in PLANS.items() if name != "standard"}
    with pytest.raises(UnknownPlan, match="'standard' is not in the configuration"):
        engine.use(poorer, "payg")
        await reserve(engine, acme, 1)


# --- windows --------------------------------------------------------------------------------------------------------


async def test_a_reservation_that_settles_in_the_next_window_does_not_touch_it(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 80_000_000, lease_ms=2 * DAY_MS)
    clock.move(DAY_MS)
    await engine.void(await hold(engine, acme, 100_000_000))  # opens the new window: all of it is there
    settlement = await engine.settle(held, 30_000_000 * FEMTO_PER_NANO, "")
    assert settlement.from_allowance_nano == 30_000_000
    funds = await operator.funds(ACCOUNT)
    assert (funds.granted_nano, funds.used_nano, funds.held_nano) == (100_000_000, 0, 0)
    postings = [entry["postings"].split() for entry in await ledger(store)]
    lapsed = [int(words[words.index(book) + 1]) for words in postings if (book := f"lapsed:{DAY_MS}") in words]
    assert lapsed == [20_000_000, 50_000_000]  # at the refresh, and what the reservation left over


async def test_unused_allowance_lapses_and_prepaid_credits_do_not(
    operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    await operator.credit(ACCOUNT, CREDIT, "grant")
    clock.move(40 * DAY_MS)
    funds = await operator.funds(ACCOUNT)
    assert (funds.granted_nano, funds.balance_nano) == (100_000_000, CREDIT)


@pytest.mark.parametrize(("year", "month"), [(2027, 2), (2027, 4), (2027, 12), (2028, 2)])
@pytest.mark.parametrize(
    ("plan", "monthly", "refresh_ms"),
    [("professional", 15 * CREDIT, DAY_MS), ("developer", 150 * CREDIT, 8 * HOUR_MS)],
)
async def test_a_months_windows_sum_to_the_monthly_figure(
    operator: Operator, clock: MovableClock, plan: str, monthly: int, refresh_ms: int, year: int, month: int
) -> None:
    start_ms, end_ms = (
        round(datetime(year + at // 12, at % 12 + 1, 1, tzinfo=UTC).timestamp() * 1000) for at in (month - 1, month)
    )
    clock.freeze_at(start_ms)
    await operator.create_account(ACCOUNT, plan)
    total, announced = 0, None
    for at_ms in range(start_ms, end_ms, refresh_ms):
        clock.freeze_at(at_ms)
        funds = await operator.funds(ACCOUNT)
        assert announced in {None, funds.granted_nano}
        assert funds.resets_at_ms == at_ms + refresh_ms
        total, announced = total + funds.granted_nano, funds.allowance_at_nano(at_ms + refresh_ms, PLANS[plan])
    assert total == monthly


async def test_time_never_runs_backwards_for_an_account(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    clock.move(DAY_MS)
    held = await hold(engine, acme, 100_000_000)
    await engine.settle(held, 100_000_000 * FEMTO_PER_NANO, "")
    clock.move(-DAY_MS)
    assert (await denial(engine, acme, 1)).reason == "allowance_spent"
    assert (await operator.funds(ACCOUNT)).now_ms == START_MS + DAY_MS


@pytest.mark.parametrize("skew_ms", [60_001, -60_001])
async def test_a_gateway_whose_clock_differs_gets_no_refresh(
    engine: CreditEngine, acme: Identity, clock: MovableClock, monkeypatch: pytest.MonkeyPatch, skew_ms: int
) -> None:
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() + skew_ms)
    await engine.void(await hold(engine, acme, 1))  # within the window nobody's clock matters
    clock.move(DAY_MS)
    with pytest.raises(StoreUnavailable, match="clocks of store and gateway differ"):
        await reserve(engine, acme, 1)
    monkeypatch.setattr(scripts, "gateway_ms", lambda: clock.now_ms() + 60_000)
    await engine.void(await hold(engine, acme, 1))
    await engine.close(5)


# --- plans ----------------------------------------------------------------------------------------------------------


async def test_changing_plans_back_and_forth_resets_nothing(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    held = await hold(engine, acme, 70_000_000)
    await engine.settle(held, 70_000_000 * FEMTO_PER_NANO, "")
    for plan in ("developer", "professional", "developer", "standard"):
        assert (await operator.set_plan(ACCOUNT, plan)).used_nano == 70_000_000
    assert (await operator.set_plan(ACCOUNT, "payg")).windows == ()
    await operator.set_plan(ACCOUNT, "standard")
    assert (await operator.funds(ACCOUNT)).allowance_remaining_nano == 30_000_000


async def test_a_longer_cycle_counts_what_was_used_earlier_in_the_day(
    engine: CreditEngine, operator: Operator, clock: MovableClock
) -> None:
    identity = await new_identity(operator, engine, "dev", "developer")
    held = await hold(engine, identity, CREDIT)
    await engine.settle(held, CREDIT * FEMTO_PER_NANO, "")
    clock.move(8 * HOUR_MS)
    assert (await operator.funds("dev")).used_nano == 0
    assert (await operator.set_plan("dev", "professional")).used_nano == 900_000_000
    assert (await operator.set_plan("dev", "developer")).used_nano == 900_000_000


async def test_what_a_request_in_flight_holds_stays_held_when_the_plan_is_lowered(
    engine: CreditEngine, operator: Operator
) -> None:
    identity = await new_identity(operator, engine, ACCOUNT, "professional")
    held = await hold(engine, identity, 400_000_000)
    funds = await operator.set_plan(ACCOUNT, "standard")
    assert (funds.granted_nano, funds.held_nano) == (100_000_000, 400_000_000)
    await operator.set_plan(ACCOUNT, "payg")
    settlement = await engine.settle(held, 400_000_000 * FEMTO_PER_NANO, "")
    assert (settlement.from_allowance_nano, settlement.written_off_nano) == (400_000_000, 0)


async def test_a_plan_change_that_is_not_newer_is_refused(operator: Operator, acme: Identity) -> None:
    await operator.set_plan(ACCOUNT, "developer", "change-7", version=7)
    with pytest.raises(Rejected, match="version 6 is not newer than 7"):
        await operator.set_plan(ACCOUNT, "payg", "change-6", version=6)
    assert (await operator.set_plan(ACCOUNT, "developer", "change-7", version=7)).plan == "developer"
    with pytest.raises(OperationConflict):
        await operator.set_plan(ACCOUNT, "payg", "change-7", version=8)
    with pytest.raises(UnknownPlan):
        await operator.set_plan(ACCOUNT, "gold")
    assert (await operator.funds(ACCOUNT)).plan == "developer"


# --- operations -----------------------------------------------------------------------------------------------------


async def test_a_grant_happens_once(operator: Operator, store: Store, acme: Identity) -> None:
    assert await operator.credit(ACCOUNT, 5 * CREDIT, "grant", "invoice-1", "paid") == (5 * CREDIT, False)
    assert await operator.credit(ACCOUNT, 5 * CREDIT, "grant", "invoice-1", "paid") == (5 * CREDIT, True)
    with pytest.raises(OperationConflict, match="'invoice-1' was used before"):
        await operator.credit(ACCOUNT, 6 * CREDIT, "grant", "invoice-1")
    grants = [entry for entry in await ledger(store) if entry["kind"] == "grant"]
    assert [(entry["id"], entry["postings"], entry["note"]) for entry in grants] == [
        ("invoice-1", f"bought {-5 * CREDIT} balance {5 * CREDIT}", '{"reason": "paid"}')
    ]


async def test_concurrent_repeats_of_a_grant_happen_once(operator: Operator, acme: Identity) -> None:
    outcomes = await asyncio.gather(*(operator.credit(ACCOUNT, CREDIT, "grant", "once") for _ in range(20)))
    assert sorted(repeated for _, repeated in outcomes) == [False] + [True] * 19
    assert (await operator.funds(ACCOUNT)).balance_nano == CREDIT


async def test_no_more_is_refunded_than_prepaid_credits_paid(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    await operator.credit(ACCOUNT, 5 * CREDIT, "grant")
    held = await hold(engine, acme, 100_000_000 + CREDIT)
    await engine.settle(held, (100_000_000 + CREDIT) * FEMTO_PER_NANO, "")
    with pytest.raises(Rejected, match="at most 1 credits"):
        await operator.credit(ACCOUNT, CREDIT + 1, "refund")
    assert await operator.credit(ACCOUNT, CREDIT, "refund") == (5 * CREDIT, False)
    with pytest.raises(Rejected, match="at most 0 credits"):
        await operator.credit(ACCOUNT, 1, "refund")


async def test_an_account_is_opened_once(operator: Operator, acme: Identity) -> None:
    with pytest.raises(Rejected, match="exists already, on plan 'standard'"):
        await operator.create_account(ACCOUNT, "payg")
    await operator.create_account("zebra")
    assert await operator.accounts() == [ACCOUNT, "zebra"]


async def test_an_operator_lists_and_voids_reservations(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    other = await new_identity(operator, engine, "other", "standard")
    first = await hold(engine, acme, 1_000)
    clock.move(1)
    second = await hold(engine, other, 2_000)
    lines = await operator.reservations()
    assert [(line.id, line.account, line.held_nano, line.lease_expires_at_ms) for line in lines] == [
        (first.id, ACCOUNT, 1_000, START_MS + LEASE_MS),
        (second.id, "other", 2_000, START_MS + 1 + LEASE_MS),
    ]
    assert [line.id for line in await operator.reservations("other")] == [second.id]
    assert (await operator.void_reservation(first.id)).state == "voided"
    assert (await operator.void_reservation(first.id)).repeated
    assert (await engine.settle(first, 1_000 * FEMTO_PER_NANO, "")).state == "voided"
    assert await operator.reservations(ACCOUNT) == []
    for unknown in ("rsv_00ffffffffffffffffffffffff", "rsv_zz", "nonsense"):
        with pytest.raises(UnknownReservation):
            await operator.void_reservation(unknown)
    await engine.void(second)


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_refused_at_once(engine: CreditEngine, operator: Operator) -> None:
    await operator.create_account(ACCOUNT)
    key, secret = await operator.create_key(ACCOUNT, "laptop")
    kept, kept_secret = await operator.create_key(ACCOUNT, "server")
    identity = await engine.authenticate(secret)
    assert identity is not None
    await engine.void(await hold(engine, identity, 1))
    assert await operator.revoke_key(key.id) == ACCOUNT
    assert isinstance(await reserve(engine, identity, 1), Refused)
    assert await engine.authenticate(secret) is None
    assert [one.id for one in await operator.keys(ACCOUNT)] == [kept.id]
    assert await engine.authenticate(kept_secret) is not None
    with pytest.raises(EngineError, match="there is no key"):
        await operator.revoke_key(key.id)


async def test_a_secret_of_the_operators_choosing(engine: CreditEngine, operator: Operator, store: Store) -> None:
    await operator.create_account(ACCOUNT)
    await operator.create_account("other")
    secret = "sk-from-the-old-gateway"
    key, returned = await operator.create_key(ACCOUNT, "old", secret)
    assert returned == secret
    identity = await engine.authenticate(secret)
    assert identity == Identity(ACCOUNT, digest_of(secret).id)
    for account in (ACCOUNT, "other"):
        with pytest.raises(EngineError, match="has a key with this secret already"):
            await operator.create_key(account, "again", secret)
    assert [one.id for one in await operator.keys(ACCOUNT)] == [key.id]
    assert await operator.keys("other") == []
    stored = await store.call("HGETALL", shard_keys(digest_of(secret).shard).api_keys)
    assert not any(secret.encode() in text for text in stored + await store.call("HGETALL", account_key(ACCOUNT)))


async def test_keys_that_cannot_be(engine: CreditEngine, operator: Operator) -> None:
    await operator.create_account(ACCOUNT)
    for secret in ("short", "with spaces in between them", "ümläuts-are-not-visible-ascii", "x" * 257):
        with pytest.raises(ValueError, match="16 to 256 visible ASCII characters"):
            await operator.create_key(ACCOUNT, "", secret)
    with pytest.raises(ValueError, match="is not a key name"):
        await operator.create_key(ACCOUNT, "a|b")
    with pytest.raises(UnknownAccount):
        await operator.create_key("nobody")
    assert await operator.keys(ACCOUNT) == []
    assert await engine.authenticate("never-heard-of-this-one") is None


# --- leases and retention -------------------------------------------------------------------------------------------


async def test_a_lease_that_ran_out_gives_the_hold_back_and_a_late_settlement_still_lands_once(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    clock.move(LEASE_MS - 1)
    assert await engine.expire_due(SHARD) == 0
    assert (await operator.funds(ACCOUNT)).held_nano == 40_000_000
    clock.move(1)
    assert await engine.expire_due(SHARD) == 1
    assert await engine.expire_due(SHARD) == 0
    assert (await operator.funds(ACCOUNT)).held_nano == 0

    settlement = await engine.settle(held, 30_000_000 * FEMTO_PER_NANO, "")
    assert (settlement.state, settlement.from_allowance_nano) == ("settled", 30_000_000)
    assert (await engine.settle(held, 30_000_000 * FEMTO_PER_NANO, "")).repeated
    assert (await operator.funds(ACCOUNT)).used_nano == 30_000_000


async def test_the_reaper_sweeps_all_shards(
    engine: CreditEngine, operator: Operator, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "SWEEP_S", 0.05)
    for account in ("ant", "bee", "cat", "dog"):
        await hold(engine, await new_identity(operator, engine, account, "standard"), 1_000)
    clock.move(LEASE_MS)
    sweeping = asyncio.create_task(reap(engine))
    while await operator.reservations():
        await asyncio.sleep(0.01)
    sweeping.cancel()
    assert [(await operator.funds(account)).held_nano for account in ("ant", "bee", "cat", "dog")] == [0, 0, 0, 0]


async def test_a_shard_with_hundreds_of_overdue_reservations_is_swept_at_once(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    await asyncio.gather(*(hold(engine, acme, 1) for _ in range(450)))
    clock.move(LEASE_MS)
    assert await engine.expire_due(SHARD) == 450
    assert await operator.reservations() == []


async def test_an_ended_reservation_answers_repeats_for_a_day_and_is_then_forgotten(
    engine: CreditEngine, store: Store, acme: Identity, clock: MovableClock
) -> None:
    held = await hold(engine, acme, 40_000_000)
    first = await engine.settle(held, 30_000_000 * FEMTO_PER_NANO, "")
    clock.move(DAY_MS - 1)
    await engine.expire_due(SHARD)
    again = await engine.settle(held, 1, "")
    assert (again.repeated, again.from_allowance_nano) == (True, first.from_allowance_nano)
    clock.move(1)
    assert await engine.expire_due(SHARD) == 0
    with pytest.raises(UnknownReservation):
        await engine.settle(held, 1, "")
    keys = shard_keys(SHARD)
    assert (await store.call("HLEN", keys.records), await store.call("ZCARD", keys.due)) == (1, 1)


async def test_a_grant_is_remembered_for_90_days(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    await operator.credit(ACCOUNT, CREDIT, "grant", "invoice-1")
    clock.move(90 * DAY_MS - 1)
    await engine.expire_due(SHARD)
    assert await operator.credit(ACCOUNT, CREDIT, "grant", "invoice-1") == (CREDIT, True)
    clock.move(1)
    await engine.expire_due(SHARD)
    assert await operator.credit(ACCOUNT, CREDIT, "grant", "invoice-1") == (2 * CREDIT, False)


async def test_reservations_of_a_gateway_that_died_are_ended_and_may_still_settle(
    engine: CreditEngine, operator: Operator, acme: Identity, clock: MovableClock
) -> None:
    orphan = await hold(engine, acme, 40_000_000)
    clock.move(1)
    started_ms = await operator.now_ms()
    mine = await hold(engine, acme, 10_000_000)
    assert await operator.abandon_orphans(started_ms) == 1
    assert [one.id for one in await operator.reservations()] == [mine.id]
    await engine.void(mine)
    assert (await operator.funds(ACCOUNT)).held_nano == 0
    assert (await engine.settle(orphan, 30_000_000 * FEMTO_PER_NANO, "")).from_allowance_nano == 30_000_000


# --- cancelled callers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_reservation_leaves_no_hold(
    engine: CreditEngine, operator: Operator, acme: Identity, steps: int
) -> None:
    tasks = [asyncio.create_task(reserve(engine, acme, 1_000)) for _ in range(20)]
    for _ in range(steps):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Reservation):  # it was through already
            await engine.void(outcome)
    assert await engine.close(10) == 0
    assert await operator.reservations() == []
    assert (await operator.funds(ACCOUNT)).held_nano == 0
    assert engine.open_reservations == 0


async def test_reservations_cancelled_while_the_store_works_leave_no_hold(
    own_server: ValkeyServer, own_engine: CreditEngine, own_operator: Operator, own_acme: Identity
) -> None:
    own_server.pause()  # the calls are written and not answered
    tasks = [asyncio.create_task(reserve(own_engine, own_acme, 1_000)) for _ in range(20)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    own_server.resume()
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}
    assert await own_engine.close(30) == 0
    assert await own_operator.reservations() == []


@pytest.mark.parametrize("steps", range(1, 6))
async def test_a_cancelled_settlement_lands_once(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity, steps: int
) -> None:
    held = await hold(engine, acme, 40_000_000)
    task = asyncio.create_task(engine.settle(held, 30_000_000 * FEMTO_PER_NANO, ""))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await engine.close(10) == 0
    funds = await operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (30_000_000, 0)
    assert [entry["kind"] for entry in await ledger(store)].count("settle") == 1


# --- a store in trouble ---------------------------------------------------------------------------------------------


async def test_a_settlement_during_an_outage_lands_when_the_store_is_back(
    own_server: ValkeyServer, own_engine: CreditEngine, own_operator: Operator, own_acme: Identity
) -> None:
    charged = await hold(own_engine, own_acme, 40_000_000)
    given_up = await hold(own_engine, own_acme, 40_000_000)
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        await own_engine.settle(charged, 30_000_000 * FEMTO_PER_NANO, "")
    await own_engine.void(given_up)
    with pytest.raises(StoreUnavailable):
        await reserve(own_engine, own_acme, 1)

    own_server.start()
    assert await own_engine.close(30) == 0
    funds = await own_operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (30_000_000, 0)
    assert await own_operator.reservations() == []
    await own_engine.void(await hold(own_engine, own_acme, 1))


async def test_a_store_that_hangs_charges_nothing_twice(
    own_server: ValkeyServer, own_store: Store, own_engine: CreditEngine, own_operator: Operator, own_acme: Identity
) -> None:
    held = await asyncio.gather(*(hold(own_engine, own_acme, 5_000_000) for _ in range(10)))
    own_server.pause()
    settling = (own_engine.settle(one, 4_000_000 * FEMTO_PER_NANO, "") for one in held)
    for outcome in await asyncio.gather(*settling, reserve(own_engine, own_acme, 1), return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable)

    own_server.resume()
    assert await own_engine.close(30) == 0
    funds = await own_operator.funds(ACCOUNT)
    assert (funds.used_nano, funds.held_nano) == (40_000_000, 0)
    assert [entry["kind"] for entry in await ledger(own_store)].count("settle") == 10
    assert await own_operator.reservations() == []


async def test_scripts_that_the_store_forgot_are_sent_again(
    engine: CreditEngine, operator: Operator, store: Store, acme: Identity
) -> None:
    held = await hold(engine, acme, 40_000_000)
    await store.call("SCRIPT", "FLUSH")
    await engine.settle(held, 30_000_000 * FEMTO_PER_NANO, "")
    await store.call("SCRIPT", "FLUSH")
    outcomes = await asyncio.gather(*(reserve(engine, acme, 10_000_000) for _ in range(20)))
    assert sum(isinstance(outcome, Reservation) for outcome in outcomes) == 7
    assert (await operator.funds(ACCOUNT)).used_nano == 30_000_000


# --- more than one gateway ------------------------------------------------------------------------------------------


async def test_two_gateways_share_one_account(
    valkey: TimedServer,
    engine: CreditEngine,
    operator: Operator,
    acme: Identity,
    metrics: Metrics,
    journal: Journal,
) -> None:
    async with started_store(valkey.url, metrics) as store:
        second = CreditEngine(store, PLANS, "standard", metrics, journal)
        outcomes = await asyncio.gather(
            *(reserve(gateway, acme, 10_000_000) for _ in range(50) for gateway in (engine, second))
        )
        held = [outcome for outcome in outcomes if isinstance(outcome, Reservation)]
        assert len(held) == 10
        await asyncio.gather(*(second.settle(one, 1 * FEMTO_PER_NANO, "") for one in held))  # whoever settles
        assert (await operator.funds(ACCOUNT)).used_nano == 10

        await operator.set_plan(ACCOUNT, "professional")
        for gateway in (engine, second):
            one = await hold(gateway, acme, 110_000_000)
            assert (one.plan.name, one.reserved.source) == ("professional", "allowance")
            await gateway.void(one)


async def test_the_same_request_again_gets_the_same_answer(
    engine: CreditEngine, operator: Operator, acme: Identity
) -> None:
    request, femto = "a" * 24, 60_000_000 * FEMTO_PER_NANO
    first = await engine.reserve(acme, request, "model", femto, femto, LEASE_MS)
    again = await engine.reserve(acme, request, "model", femto, femto, LEASE_MS)
    assert isinstance(first, Reservation)
    assert isinstance(again, Reservation)
    assert again.reserved == first.reserved
    assert (await operator.funds(ACCOUNT)).held_nano == 60_000_000
    with pytest.raises(StoreUnavailable, match="cannot be made again"):
        await engine.reserve(acme, request, "model", femto + FEMTO_PER_NANO, femto, LEASE_MS)
    await engine.close(5)
    await engine.void(first)
