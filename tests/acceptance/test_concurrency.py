"""More requests at once than the credits are for: exactly what fits is admitted, and the rest learns why not."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.conftest import (
    BODY,
    HOLD,
    MAX_TOKENS,
    MODEL,
    NOON,
    Answer,
    Funds,
    HeldUpstream,
    ask,
    ask_default,
    at,
    chat_body,
    funds_of,
    hold_of,
    input_bound,
    new_account,
)
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock

#: A request is admitted with fewer tokens than it asks for, but not with fewer than 16.
LEAST = hold_of(BODY, 16)
NANO = Decimal("0.000000001")
#: Ten whole requests, and a nano-credit less than the smallest that would be admitted as the eleventh.
ALLOWANCE = 10 * HOLD + LEAST - NANO
MIDNIGHT = "2026-11-24T00:00:00Z"


@pytest.fixture
async def gateway(upstream: HeldUpstream, tmp_path: Path, clock: MovableClock) -> AsyncIterator[Gateway]:
    plans = {
        "ten": {"default": True, "allowance": {"per_window": str(ALLOWANCE), "refresh": "24h"}},
        "prepaid": {},
    }
    config = gateway_config(upstream.base_url, [MODEL], plans=plans)
    with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
        yield gateway


async def ask_at_once(session: aiohttp.ClientSession, gateway: Gateway, count: int) -> list[asyncio.Task[Answer]]:
    """Send count requests on as many connections."""
    return [asyncio.create_task(ask_default(session, gateway)) for _ in range(count)]


async def answered(tasks: list[asyncio.Task[Answer]], count: int) -> list[Answer]:
    """The first count answers. Raises TimeoutError if they do not come."""
    answers = []
    async with asyncio.timeout(30):
        for next_answer in asyncio.as_completed(tasks):
            answers.append(await next_answer)
            if len(answers) == count:
                break
    return answers


async def test_exactly_what_fits_is_admitted(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    upstream.hold()
    tasks = await ask_at_once(session, gateway, 100)
    refused = await answered(tasks, 90)  # no more would come: the others wait for the upstream
    await upstream.wait_for_requests(10)
    for answer in refused:
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert answer.error["code"] == "credits_in_flight"
        assert answer.headers["Retry-After"] == "1"
        assert answer.headers["retry-after-ms"] == "1000"
        assert "x-should-retry" not in answer.headers
        assert Decimal(answer.error["metadata"]["required"]) == LEAST
        assert Decimal(answer.error["metadata"]["available"]) < LEAST
    assert Decimal(refused[-1].error["metadata"]["held"]) == 10 * HOLD
    assert funds_of(gateway).held == 10 * HOLD
    listed = gateway.cli("reservations", "list", "default")["data"]
    assert [Decimal(one["held"]) for one in listed] == [HOLD] * 10
    upstream.release()
    admitted = [answer for answer in await asyncio.gather(*tasks) if answer.status == 200]
    assert [answer.cost for answer in admitted] == [upstream.cost] * 10
    assert [Decimal(answer.headers["x-credits-reserved"]) for answer in admitted] == [HOLD] * 10
    assert len(upstream.requests) == 10
    funds = funds_of(gateway)
    assert (funds.used, funds.held) == (sum(answer.cost for answer in admitted), 0)
    assert funds.used <= funds.granted == ALLOWANCE
    assert gateway.cli("reservations", "list") == {"data": []}


async def test_a_burst_that_is_answered_at_once_never_spends_more_than_there_is(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    """Holds and settlements mixed: as much is admitted as is freed in time, and each is paid for."""
    answers = await asyncio.gather(*await ask_at_once(session, gateway, 100))
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] == len(upstream.requests) >= 10
    funds = funds_of(gateway)
    assert funds.used == statuses[200] * upstream.cost <= ALLOWANCE
    assert funds.held == 0


def use_everything_held(upstream: HeldUpstream) -> None:
    upstream.prompt_tokens, upstream.completion_tokens = input_bound(BODY), MAX_TOKENS
    assert upstream.cost == HOLD


async def spend_the_allowance(session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream) -> Funds:
    """Leave less than the smallest request would need."""
    use_everything_held(upstream)
    answers = await asyncio.gather(*await ask_at_once(session, gateway, 10))
    assert [answer.status for answer in answers] == [200] * 10
    funds = funds_of(gateway)
    assert (funds.used, funds.remaining) == (10 * HOLD, LEAST - NANO)
    return funds


async def test_a_spent_allowance_is_refused_until_its_refresh(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream, clock: MovableClock
) -> None:
    await spend_the_allowance(session, gateway, upstream)
    clock.freeze_at(at(NOON) + 3_600_000)
    (answer,) = await asyncio.gather(*await ask_at_once(session, gateway, 1))
    assert (answer.status, answer.error["type"]) == (429, "usage_limit_reached")
    assert answer.error["code"] == "insufficient_quota"
    assert answer.error["resets_at"] == NOON.timestamp() + 12 * 3600
    assert MIDNIGHT in answer.error["message"]
    assert (answer.headers["Retry-After"], answer.headers["x-should-retry"]) == ("39600", "false")
    assert answer.headers["x-credits-allowance-resets-at"] == MIDNIGHT
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == answer.document["request_id"]
    assert answer.document["type"] == "error"
    assert len(upstream.requests) == 10


async def test_a_real_client_does_not_repeat_a_spent_allowance(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    await spend_the_allowance(session, gateway, upstream)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.key) as client:  # retries twice by default
        with pytest.raises(RateLimitError) as refused:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello!" * 20}])
    assert refused.value.code == "insufficient_quota"
    async with session.get(gateway.admin_url + "/metrics") as response:
        samples = text_string_to_metric_families(await response.text())
    decisions = next(family for family in samples if family.name == "quota_gateway_decisions")
    counts = {one.labels["reason"]: one.value for one in decisions.samples if one.value and "_total" in one.name}
    assert counts == {"allowance": 10, "insufficient_quota": 1}


async def test_prepaid_credits_take_over_within_a_request(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    left = (await spend_the_allowance(session, gateway, upstream)).remaining
    balance = 2 * HOLD
    gateway.cli("credits", "grant", "default", f"{balance:f}")
    sources = []
    for _ in range(2):
        (answer,) = await asyncio.gather(*await ask_at_once(session, gateway, 1))
        assert (answer.status, answer.cost) == (200, HOLD)
        sources.append(answer.source)
        balance -= HOLD - left
        left = Decimal(0)
        assert Decimal(answer.headers["x-credits-balance"]) == balance
        assert Decimal(answer.headers["x-credits-allowance-remaining"]) == 0
    assert sources == ["mixed", "payg"]
    funds = funds_of(gateway)
    assert (funds.used, funds.remaining) == (ALLOWANCE, 0)
    assert (funds.balance, funds.balance_held) == (balance, 0)


async def test_without_a_refresh_an_empty_account_is_asked_to_pay(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    key = new_account(gateway, "empty", "prepaid")
    answer = await ask(session, gateway, key, BODY)
    assert (answer.status, answer.error["type"]) == (402, "insufficient_quota")
    assert answer.error["code"] == "insufficient_quota"
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    assert "resets_at" not in answer.error
    assert upstream.requests == []


async def test_a_request_dearer_than_what_is_left_says_what_can_be_had(
    session: aiohttp.ClientSession, gateway: Gateway, upstream: HeldUpstream
) -> None:
    key = new_account(gateway, "poor", "prepaid", grant=cost_of(input_bound(BODY), 5))
    answer = await ask(session, gateway, key, BODY)
    assert (answer.status, answer.error["type"]) == (402, "insufficient_quota")
    assert answer.error["code"] == "request_exceeds_balance"
    assert "requires more credits, or fewer max_tokens" in answer.error["message"]
    assert "You requested up to 100 tokens, but can only afford 5" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    # And it is true: asking for that many is admitted.
    assert (await ask(session, gateway, key, chat_body(5))).status == 200
    assert [request["max_tokens"] for request in upstream.requests] == [5]
