"""Refreshes, through the real gateway process with a clock that the test moves: what lapses, what returns, who pays."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest

from tests.acceptance.conftest import (
    BODY,
    MAX_TOKENS,
    MODEL,
    NOON,
    STREAM,
    HeldUpstream,
    ask,
    ask_default,
    at,
    funds_of,
    hold_of,
    input_bound,
    new_account,
)
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock

STREAM_HOLD = hold_of(STREAM, MAX_TOKENS)
#: Pays for 70 of a request's 100 tokens, so that the balance holds the rest.
ALLOWANCE = hold_of(BODY, 70)
BALANCE = Decimal("0.001")
#: So near to midnight that the lease of a request in flight lasts beyond it.
EVENING = datetime(2026, 11, 23, 23, 50, tzinfo=UTC)
MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
async def gateway(upstream: HeldUpstream, tmp_path: Path, clock: MovableClock) -> AsyncIterator[Gateway]:
    config = gateway_config(upstream.base_url, [MODEL])
    config["plans"]["standard"]["allowance"]["per_window"] = str(ALLOWANCE)
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        yield gateway


async def spend_the_allowance(session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream) -> None:
    """Use all of the current window's allowance, to the nano-credit."""
    given, made = upstream.prompt_tokens, upstream.completion_tokens
    upstream.prompt_tokens, upstream.completion_tokens = input_bound(BODY), 70
    answer = await ask_default(session, gateway)
    assert (answer.status, answer.cost, answer.source) == (200, ALLOWANCE, "allowance")
    assert answer.headers["x-credits-max-tokens"] == "70"
    assert Decimal(answer.headers["x-credits-allowance-remaining"]) == 0
    upstream.prompt_tokens, upstream.completion_tokens = given, made


@pytest.mark.parametrize("completion_tokens", [10, 90], ids=["within-the-allowance", "beyond-it"])
async def test_a_stream_across_a_refresh_is_paid_by_the_window_it_began_in(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    upstream: HeldUpstream,
    clock: MovableClock,
    completion_tokens: int,
) -> None:
    clock.set_to(EVENING)
    gateway.cli("credits", "grant", "default", str(BALANCE))
    upstream.completion_tokens = completion_tokens
    upstream.hold()
    stream = asyncio.create_task(ask_default(session, gateway, STREAM))
    await upstream.wait_for_requests(1)
    evening = funds_of(gateway)
    assert (evening.held, evening.balance_held) == (ALLOWANCE, STREAM_HOLD - ALLOWANCE)

    clock.set_to(MIDNIGHT + timedelta(minutes=2))
    morning = funds_of(gateway)
    assert evening.window is not None
    assert morning.window == evening.window + 1
    assert (morning.granted, morning.used, morning.held, morning.remaining) == (ALLOWANCE, 0, 0, ALLOWANCE)
    assert morning.balance_held == STREAM_HOLD - ALLOWANCE

    upstream.release()
    answer = await stream
    from_balance = max(Decimal(0), upstream.cost - ALLOWANCE)
    credits = answer.events[-1]["usage"]["credits"]
    assert (answer.status, answer.source) == (200, "mixed")
    assert Decimal(credits["cost"]) == upstream.cost
    assert credits["source"] == ("mixed" if from_balance else "allowance")
    assert Decimal(credits["allowance_remaining"]) == ALLOWANCE
    assert credits["allowance_resets_at"] == "2026-11-25T00:00:00Z"
    assert Decimal(credits["balance"]) == BALANCE - from_balance
    after = funds_of(gateway)
    assert (after.used, after.held, after.remaining) == (0, 0, ALLOWANCE)
    assert (after.balance, after.balance_held) == (BALANCE - from_balance, 0)
    assert gateway.cli("reservations", "list") == {"data": []}


async def test_an_answer_that_outlives_its_lease_is_paid_for_once(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    upstream.hold()
    late = asyncio.create_task(ask_default(session, gateway))
    await upstream.wait_for_requests(1)
    (listed,) = gateway.cli("reservations", "list", "default")["data"]
    assert Decimal(listed["held"]) == funds_of(gateway).held == ALLOWANCE

    clock.set_to(datetime.fromisoformat(listed["lease_expires_at"]) + timedelta(seconds=1))
    async with asyncio.timeout(20):
        while gateway.cli("reservations", "list", "default")["data"]:
            await asyncio.sleep(0.1)
    assert funds_of(gateway).remaining == ALLOWANCE

    upstream.release()
    answer = await late
    assert (answer.status, answer.cost) == (200, upstream.cost)
    funds = funds_of(gateway)
    assert (funds.used, funds.held, funds.remaining) == (upstream.cost, 0, ALLOWANCE - upstream.cost)


async def test_requests_of_the_new_window_do_not_meet_the_old_ones_hold(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    clock.set_to(EVENING)
    upstream.hold()
    stream = asyncio.create_task(ask_default(session, gateway, STREAM))
    await upstream.wait_for_requests(1)
    busy = await ask_default(session, gateway)
    assert (busy.status, busy.error["code"]) == (429, "credits_in_flight")

    clock.set_to(MIDNIGHT + timedelta(minutes=2))
    second = asyncio.create_task(ask_default(session, gateway))
    await upstream.wait_for_requests(2)
    assert funds_of(gateway).held == ALLOWANCE
    upstream.release()
    assert (await second).cost == upstream.cost
    assert Decimal((await stream).events[-1]["usage"]["credits"]["cost"]) == upstream.cost
    funds = funds_of(gateway)
    assert (funds.used, funds.held, funds.remaining) == (upstream.cost, 0, ALLOWANCE - upstream.cost)


async def test_a_refusal_names_the_refresh_and_ends_with_it(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    await spend_the_allowance(session, gateway, upstream)

    # An hour later than it has been: an account's time never runs backwards.
    clock.freeze_at(at(NOON + timedelta(hours=1)))
    noon = await ask_default(session, gateway)
    assert (noon.status, noon.error["type"], noon.error["code"]) == (429, "usage_limit_reached", "insufficient_quota")
    assert "2026-11-24T00:00:00Z" in noon.error["message"]
    assert noon.error["resets_at"] == MIDNIGHT.timestamp()
    assert (noon.headers["Retry-After"], noon.headers["x-should-retry"]) == ("39600", "false")

    clock.freeze_at(at(datetime(2026, 11, 23, 23, 59, 30, tzinfo=UTC)) + 250)
    late = await ask_default(session, gateway)
    assert (late.status, late.error["type"], late.error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert (late.headers["Retry-After"], late.headers["retry-after-ms"]) == ("30", "29750")
    assert "x-should-retry" not in late.headers

    clock.freeze_at(at(MIDNIGHT) - 1)
    assert (await ask_default(session, gateway)).headers["retry-after-ms"] == "1"
    clock.freeze_at(at(MIDNIGHT))
    refreshed = await ask_default(session, gateway)
    assert (refreshed.status, refreshed.cost, refreshed.source) == (200, upstream.cost, "allowance")
    assert refreshed.headers["x-credits-allowance-resets-at"] == "2026-11-25T00:00:00Z"
    assert Decimal(refreshed.headers["x-credits-allowance-remaining"]) == ALLOWANCE - upstream.cost


async def test_a_grant_ends_a_refusal_and_the_refresh_ends_paying(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    await spend_the_allowance(session, gateway, upstream)
    assert (await ask_default(session, gateway)).status == 429
    gateway.cli("credits", "grant", "default", str(BALANCE))
    paid = await ask_default(session, gateway)
    assert (paid.status, paid.cost, paid.source) == (200, upstream.cost, "payg")
    assert Decimal(paid.headers["x-credits-balance"]) == BALANCE - upstream.cost

    clock.set_to(MIDNIGHT)
    # A hold that both pay for, and a cost that the allowance pays alone.
    free = await ask_default(session, gateway)
    assert (free.status, free.cost, free.source) == (200, upstream.cost, "allowance")
    assert Decimal(free.headers["x-credits-balance"]) == BALANCE - upstream.cost
    # A refund in the new window gives back what the balance paid in the old one, and no more.
    gateway.cli("credits", "refund", "default", f"{upstream.cost:f}")
    funds = funds_of(gateway)
    assert (funds.balance, funds.used) == (BALANCE, upstream.cost)
    with pytest.raises(RuntimeError, match="exited with 1"):
        gateway.cli("credits", "refund", "default", "0.000000001")


async def test_developer_has_three_windows_a_day(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    clock.set_to(MIDNIGHT + timedelta(hours=7, minutes=59))
    key = new_account(gateway, "dev", "developer")
    windows = []
    for hours, resets_at in ((7, "24T08:00:00Z"), (8, "24T16:00:00Z"), (23, "25T00:00:00Z"), (24, "25T08:00:00Z")):
        clock.set_to(MIDNIGHT + timedelta(hours=hours, minutes=59))
        answer = await ask(session, gateway, key, BODY)
        assert (answer.status, answer.source) == (200, "allowance")
        assert answer.cost == cost_of(upstream.prompt_tokens, upstream.completion_tokens, rate="0.9")
        assert answer.headers["x-credits-allowance-resets-at"] == f"2026-11-{resets_at}"
        funds = funds_of(gateway, "dev")
        assert (funds.used, funds.remaining) == (answer.cost, funds.granted - answer.cost)
        windows.append(funds.window)
    assert windows[0] is not None
    assert windows == [windows[0], windows[0] + 1, windows[0] + 2, windows[0] + 3]


@pytest.mark.parametrize(
    ("plan", "refresh_hours", "year", "month", "credits"),
    [
        ("professional", 24, 2026, 12, 15),
        ("professional", 24, 2027, 2, 15),
        ("developer", 8, 2027, 2, 150),
    ],
)
async def test_a_months_windows_sum_to_the_months_credits(
    session: aiohttp.ClientSession,
    gateway: Gateway,
    upstream: HeldUpstream,
    clock: MovableClock,
    plan: str,
    refresh_hours: int,
    year: int,
    month: int,
    credits: int,
) -> None:
    """An answer with nothing in it costs nothing and says what is left of the allowance: all of it."""
    upstream.completion_tokens = 0
    start = datetime(year, month, 1, tzinfo=UTC)
    clock.set_to(start - timedelta(hours=1))
    key = new_account(gateway, "monthly", plan)
    granted = []
    moment = start
    while moment.month == month:
        clock.freeze_at(at(moment))
        answer = await ask(session, gateway, key, BODY)
        assert (answer.status, answer.cost) == (200, 0)
        granted.append(Decimal(answer.headers["x-credits-allowance-remaining"]))
        moment += timedelta(hours=refresh_hours)
        assert answer.headers["x-credits-allowance-resets-at"] == moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert sum(granted) == credits
    assert max(granted) - min(granted) <= Decimal("0.000000001")
