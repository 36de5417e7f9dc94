"""The openai SDK, through the real gateway process, against a real llama.cpp server: every charge is the server's own
usage times the price, to the nano-credit."""

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import BadRequestError, OpenAI
from openai.types import CompletionUsage

from tests.acceptance.conftest import funds_of, input_bound, new_account
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock
from tests.upstreams.faulty import SLOW_CHUNKS, FaultyUpstream
from tests.upstreams.llama import MODEL_NAME

EMBEDDING = "tiny-embedding"
#: What the plan "tight" grants: enough for the prompt's bound and some of the 500 tokens that its test asks for.
TIGHT = Decimal("0.00007")
NANO = Decimal("0.000000001")
MESSAGES: Any = [{"role": "user", "content": "Tell me about the sea."}]
#: Makes two calls with one prompt report the same usage.
NO_CACHE = {"cache_prompt": False}


@pytest.fixture(scope="module")
def gateway(
    llama: str, llama_embedding: str, tmp_path_factory: pytest.TempPathFactory, module_clock: MovableClock
) -> Iterator[Gateway]:
    config = gateway_config(llama, [MODEL_NAME, EMBEDDING])
    config["upstreams"]["embedding"] = {"base_url": llama_embedding}
    config["models"]["models"][EMBEDDING]["upstream"] = "embedding"
    config["plans"]["tight"] = {"allowance": {"per_window": str(TIGHT), "refresh": "24h"}}
    config["plans"]["prepaid"] = {}
    with running_gateway(config, data_dir=tmp_path_factory.mktemp("data"), clock=module_clock) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


@pytest.fixture
def direct(llama: str) -> Iterator[OpenAI]:
    """The SDK on the server itself, without the gateway."""
    with OpenAI(base_url=llama, api_key="none", max_retries=0) as client:
        yield client


def openai_client(gateway: Gateway, key: str | None = None) -> OpenAI:
    return OpenAI(base_url=gateway.base_url, api_key=key or gateway.key, max_retries=0)


@dataclass
class Spent:
    """What an account has less of after a block than before it."""

    allowance: Decimal = Decimal(0)
    balance: Decimal = Decimal(0)


@contextmanager
def spending(gateway: Gateway, account: str = "default") -> Iterator[Spent]:
    """What the block spends, to be read after it; nothing may be held afterwards."""
    before, spent = funds_of(gateway, account), Spent()
    yield spent
    after = funds_of(gateway, account)
    assert (after.held, after.balance_held) == (0, 0)
    assert after.granted == after.used + after.remaining
    spent.allowance, spent.balance = after.used - before.used, before.balance - after.balance


def cost_of_usage(usage: CompletionUsage | None, rate: str = "1") -> Decimal:
    """The price of what the server says it used."""
    assert usage is not None
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return cost_of(usage.prompt_tokens, usage.completion_tokens, cached, rate)


def cost_header(headers: Any) -> Decimal:
    text = headers["x-credits-cost"]
    assert re.fullmatch(r"\d+(\.\d{1,9})?", text)
    return Decimal(text)


def test_a_chat_costs_its_usage(gateway: Gateway, client: OpenAI, direct: OpenAI) -> None:
    """Of two like prompts the second is almost all cached, which is cheaper."""
    costs = []
    with spending(gateway) as spent:
        for _ in range(2):
            raw = client.chat.completions.with_raw_response.create(
                model=MODEL_NAME, messages=MESSAGES, max_completion_tokens=20
            )
            answer = raw.parse()
            assert answer.usage is not None
            assert answer.choices[0].message.content
            assert cost_header(raw.headers) == cost_of_usage(answer.usage)
            assert raw.headers["x-credits-source"] == "allowance"
            assert raw.headers["x-request-id"] == raw.headers["request-id"]
            assert "x-credits-max-tokens" not in raw.headers
            costs.append(cost_header(raw.headers))
    assert costs[1] < costs[0]
    assert (spent.allowance, spent.balance) == (sum(costs), 0)
    said = direct.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_completion_tokens=20).usage
    assert said is not None
    assert answer.usage is not None
    assert (said.prompt_tokens, said.completion_tokens) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert gateway.cli("reservations", "list") == {"data": []}


def test_a_streamed_chat_says_its_cost_in_the_usage(gateway: Gateway, client: OpenAI) -> None:
    with spending(gateway) as spent:
        chunks = list(
            client.chat.completions.create(
                model=MODEL_NAME,
                messages=MESSAGES,
                max_tokens=21,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 21
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    credits = (usage.model_extra or {})["credits"]
    assert Decimal(credits["cost"]) == cost_of_usage(usage) == spent.allowance
    assert credits["source"] == "allowance"
    assert Decimal(credits["allowance_remaining"]) == funds_of(gateway).remaining


def test_a_streamed_cost_is_a_number_without_exponent(gateway: Gateway) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": MESSAGES,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(gateway.base_url + "/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        assert "x-credits-cost" not in response.headers
        assert Decimal(response.headers["x-credits-reserved"]) > 0
        *_, last, done = [line for line in response.read().decode().splitlines() if line]
    assert done == "data: [DONE]"
    usage = json.loads(last.removeprefix("data: "), parse_float=str)["usage"]
    assert re.search(r'"cost": ?0\.0000[0-9]+[,}]', last)
    assert usage["cost"] == usage["credits"]["cost"]


def test_a_stream_without_usage_costs_the_same(gateway: Gateway, client: OpenAI, direct: OpenAI) -> None:
    """The gateway asks the server for the usage, and the client that did not ask never sees it."""
    asked: Any = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 22, "extra_body": NO_CACHE}
    with spending(gateway) as spent:
        chunks = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    usage = direct.chat.completions.create(**asked).usage
    assert spent.allowance == cost_of_usage(usage)


def test_completions_cost_their_usage(gateway: Gateway, client: OpenAI) -> None:
    with spending(gateway) as spent:
        raw = client.completions.with_raw_response.create(model=MODEL_NAME, prompt="Once upon a time", max_tokens=23)
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 23
    assert cost_header(raw.headers) == cost_of_usage(answer.usage) == spent.allowance


def test_streamed_completions_cost_their_usage(gateway: Gateway, client: OpenAI) -> None:
    with spending(gateway) as spent:
        chunks = list(
            client.completions.create(
                model=MODEL_NAME,
                prompt="Once upon a time",
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    usage = [chunk.usage for chunk in chunks if chunk.usage][-1]
    assert usage.completion_tokens == 24
    assert Decimal((usage.model_extra or {})["credits"]["cost"]) == cost_of_usage(usage) == spent.allowance


def test_embeddings_cost_their_usage(gateway: Gateway, client: OpenAI) -> None:
    with spending(gateway) as spent:
        raw = client.embeddings.with_raw_response.create(model=EMBEDDING, input=["the sea", "the mountains"])
    answer = raw.parse()
    assert len(answer.data) == 2
    assert answer.data[0].embedding != answer.data[1].embedding
    assert cost_header(raw.headers) == cost_of(answer.usage.prompt_tokens, 0) == spent.allowance > 0


def test_the_other_prefix_is_the_same(gateway: Gateway) -> None:
    with (
        OpenAI(base_url=gateway.base_url.replace("/v1", "/api/v1"), api_key=gateway.key, max_retries=0) as client,
        spending(gateway) as spent,
    ):
        raw = client.chat.completions.with_raw_response.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=5)
    assert cost_header(raw.headers) == cost_of_usage(raw.parse().usage) == spent.allowance


def test_a_plans_rate_is_rounded_once(gateway: Gateway, direct: OpenAI) -> None:
    """Rounding the list price first would charge a nano-credit too much."""
    said = direct.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=1).usage
    assert said is not None
    max_tokens = next(
        tokens
        for tokens in range(2, 200)
        if cost_of(said.prompt_tokens, tokens, 0, "0.9")
        != (cost_of(said.prompt_tokens, tokens) * Decimal("0.9")).quantize(NANO, ROUND_CEILING)
    )
    key = new_account(gateway, "dev", "developer")
    with openai_client(gateway, key) as client, spending(gateway, "dev") as spent:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=max_tokens, extra_body=NO_CACHE
        )
    usage = raw.parse().usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (said.prompt_tokens, max_tokens)
    assert cost_header(raw.headers) == cost_of_usage(usage, "0.9") == spent.allowance


def test_prepaid_credits_pay_the_list_price(gateway: Gateway) -> None:
    key = new_account(gateway, "prepaid", "prepaid", grant=Decimal("0.5"))
    with openai_client(gateway, key) as client, spending(gateway, "prepaid") as spent:
        raw = client.chat.completions.with_raw_response.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=25)
    assert cost_header(raw.headers) == cost_of_usage(raw.parse().usage) == spent.balance
    assert raw.headers["x-credits-source"] == "payg"
    assert Decimal(raw.headers["x-credits-balance"]) == Decimal("0.5") - spent.balance
    assert "x-credits-allowance-resets-at" not in raw.headers


def test_max_tokens_is_lowered_to_what_can_be_paid(gateway: Gateway) -> None:
    key = new_account(gateway, "tight", "tight")
    with openai_client(gateway, key) as client, spending(gateway, "tight") as spent:
        raw = client.chat.completions.with_raw_response.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=500)
    answer, lowered = raw.parse(), int(raw.headers["x-credits-max-tokens"])
    assert answer.usage is not None
    assert 16 <= lowered < 500
    assert answer.usage.completion_tokens == lowered
    assert answer.choices[0].finish_reason == "length"
    assert Decimal(raw.headers["x-credits-reserved"]) == TIGHT
    assert cost_header(raw.headers) == cost_of_usage(answer.usage) == spent.allowance <= TIGHT
    # As many as the rest pays for when every byte of the request is a token: one more would have been too many.
    bound = input_bound(raw.http_request.content)
    assert cost_of(bound, lowered) <= TIGHT < cost_of(bound, lowered + 1)


def test_an_unpriced_limit_is_refused(gateway: Gateway, client: OpenAI) -> None:
    """llama.cpp lets n_predict beat max_tokens, so one would pay for 1 token and be given 4000."""
    with spending(gateway) as spent, pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=1, extra_body={"n_predict": 4000}
        )
    assert (refused.value.code, refused.value.param) == ("invalid_body", "n_predict")
    assert "n_predict" in refused.value.message
    assert (spent.allowance, spent.balance) == (0, 0)


async def test_a_stream_arrives_as_it_is_produced(
    tmp_path: Path, clock: MovableClock, session: aiohttp.ClientSession
) -> None:
    async with FaultyUpstream() as upstream:
        config = gateway_config(upstream.base_url, ["slow-stream"])
        body = {"model": "slow-stream", "messages": MESSAGES, "stream": True}
        with running_gateway(config, data_dir=tmp_path / "data", clock=clock) as gateway:
            async with session.post(
                gateway.base_url + "/chat/completions", json=body, headers={"x-api-key": str(gateway.key)}
            ) as response:
                for number in (0, 1):
                    line = await response.content.readline()
                    assert json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": f" {number}"}
                    assert await response.content.readline() == b"\n"
                assert upstream.requests[0].events_sent < SLOW_CHUNKS
                assert not upstream.requests[0].finished
            await upstream.wait_for_disconnects()


def test_every_answer_of_a_request_is_paid(gateway: Gateway, client: OpenAI, direct: OpenAI) -> None:
    """llama.cpp reports each of two streamed answers by itself, and of a list of prompts only the first."""
    single = direct.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=1, extra_body=NO_CACHE)
    assert single.usage is not None
    with spending(gateway) as spent:
        stream = client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=20, n=2, stream=True, extra_body=NO_CACHE
        )
        answered = {choice.index for chunk in stream for choice in chunk.choices}
    assert answered == {0, 1}
    assert spent.allowance == cost_of(single.usage.prompt_tokens, 40)
    prompts = [f"Prompt number {number} of several." for number in range(8)]
    with spending(gateway) as spent:
        answer = client.completions.create(model=MODEL_NAME, prompt=prompts, max_tokens=30, extra_body=NO_CACHE)
    assert answer.usage is not None
    assert len(answer.choices) == len(prompts)
    reported = cost_of_usage(answer.usage)
    shown = cost_of(sum(len(text) // 8 for text in prompts), sum(len(choice.text) for choice in answer.choices) // 8)
    assert reported < shown <= spent.allowance
