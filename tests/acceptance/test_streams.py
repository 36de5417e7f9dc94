"""Streams through the real gateway process: they hold a little, more as they flow, and end well when credits end."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.conftest import Answer, Funds, funds_of, hanging_store, hold_of, input_bound, new_account
from tests.gateway_process import INPUT_PRICE, OUTPUT_PRICE, Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock
from tests.upstreams.llama import MODEL_NAME
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: A gateway learns how long a model's answers are: so every test has a model of its own.
TALKERS = [f"talker-{number:02}" for number in range(50)]
#: One that says of itself in the configuration that it hides its reasoning.
THINKER = "thinker"
#: The same upstream, counted in other ways.
BY_BYTES, BY_USAGE, BY_MAXIMUM = "by-bytes", "by-usage", "by-maximum"
MAX_TOKENS = 2000
#: What a stream of a model that nothing is known of holds first.
SLICE = 256
PROMPT_TOKENS = 20
WORD = " w"
SECONDS = 30
PLENTY = Decimal(1)


# --- the upstream ----------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """One request as the upstream saw it. words: said so far, to each answer; left: the client went away before the
    end."""

    body: dict[str, Any]
    words: int = 0
    left: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Talker(LocalUpstream):
    """An upstream that says as many words as the request's ``user`` field asks for, each a token and an event.

    ``user`` is JSON: words; pause_at: how many words it says before it waits for ``go(name)``; stop_at: how many before
    it waits for its client to leave; fail_at: how many before it breaks; each: the words of each of several answers.
    """

    def __init__(self) -> None:
        super().__init__(web.post("/v1/{path:.*}", self._answer))
        self.told: list[Told] = []
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def go(self, name: str) -> None:
        """Let the requests that wait for name go on."""
        self._gates[name].set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        told = Told(await request.json())
        self.told.append(told)
        plan = json.loads(told.body["user"])
        if not told.body.get("stream"):
            return self._whole(told, plan)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await self._talk(request, response, told, plan)
        except (ConnectionError, asyncio.CancelledError):
            told.left = True
            raise
        finally:
            told.over.set()
        return response

    def _whole(self, told: Told, plan: dict[str, Any]) -> web.Response:
        words = min(plan["words"], told.body["max_tokens"])
        message = {"role": "assistant", "content": WORD * words}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return web.json_response({"id": "talk-1", "choices": choices, "usage": _usage(words)})

    async def _talk(self, request: web.Request, response: web.StreamResponse, told: Told, plan: dict[str, Any]) -> None:
        chat, answers = request.path.endswith("/chat/completions"), told.body.get("n", 1)
        options = told.body.get("stream_options", {})
        running = options.get("continuous_usage_stats")
        limit = told.body["max_tokens"]
        lengths = [min(words, limit) for words in plan.get("each", [plan["words"]] * answers)]
        await response.prepare(request)
        for number in range(max(lengths)):
            if number == plan.get("pause_at"):
                await self._gates[plan["name"]].wait()
            if number == plan.get("stop_at"):
                await asyncio.Event().wait()
            if number == plan.get("fail_at"):
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError
            members = {"usage": _usage(number + 1)} if running else {}
            for index in [index for index, length in enumerate(lengths) if number < length]:
                await response.write(_event(chat, index, WORD, **members))
                if number + 1 == lengths[index]:
                    await response.write(_event(chat, index, "", "length" if number + 1 == limit else "stop"))
            told.words = number + 1
            await asyncio.sleep(0)
        if options.get("include_usage"):
            await response.write(_data({**_FRAME, "choices": [], "usage": _usage(sum(lengths))}))
        await response.write(b"data: [DONE]\n\n")


_FRAME = {"id": "talk-1", "object": "chat.completion.chunk", "created": 1, "model": "talk"}


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": words, "total_tokens": PROMPT_TOKENS + words}


def _event(chat: bool, index: int, text: str, finish: str | None = None, **members: Any) -> bytes:
    said: dict[str, Any] = {"delta": {"content": text} if text else {}} if chat else {"text": text}
    return _data({**_FRAME, "choices": [{"index": index, **said, "finish_reason": finish}], **members})


def _data(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


# --- the bench -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A prepaid account, whose balance is all that it has."""

    gateway: Gateway
    session: aiohttp.ClientSession
    name: str
    key: str

    @property
    def funds(self) -> Funds:
        return funds_of(self.gateway, self.name)

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **more}

    async def ask(self, body: bytes, path: str = "/chat/completions", **headers: str) -> Answer:
        async with asyncio.timeout(SECONDS):
            async with self.session.post(
                self.gateway.base_url + path, data=body, headers=self.headers(**headers)
            ) as response:
                return Answer(response.status, response.headers.copy(), await response.read())

    def start(self, body: bytes, path: str = "/chat/completions") -> asyncio.Task[Answer]:
        return asyncio.create_task(self.ask(body, path))

    async def wait_for(self, held: Decimal) -> None:
        """Return once this much is held. Raises TimeoutError."""
        async with asyncio.timeout(SECONDS):
            while self.funds.balance_held != held:
                await asyncio.sleep(0.02)

    async def idle_balance(self) -> Decimal:
        """The balance once nothing is held."""
        await self.wait_for(Decimal(0))
        return self.funds.balance


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Talker
    session: aiohttp.ClientSession
    numbers: Any = field(default_factory=count)

    def account(self, grant: Decimal) -> Account:
        name = f"a{next(self.numbers)}"
        return Account(self.gateway, self.session, name, new_account(self.gateway, name, "prepaid", grant=grant))

    async def truncated(self) -> float:
        async with self.session.get(self.gateway.admin_url + "/metrics") as answer:
            families = text_string_to_metric_families(await answer.text())
        name = "quota_gateway_streams_truncated_total"
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    async def log_of(self, answer: Answer) -> dict[str, Any]:
        """The log line of an answered request, which is written after its last byte."""
        async with asyncio.timeout(10):
            while True:
                ended = self.gateway.stderr.rpartition("\n")[0]
                lines = [json.loads(line) for line in ended.splitlines()]
                for line in lines:
                    if line.get("request_id") == answer.headers["x-request-id"]:
                        return dict(line)
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("streams") / "data"
    async with Talker() as upstream, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        with running_gateway(_config(upstream.base_url), data_dir=data_dir) as gateway:
            yield Bench(gateway, upstream, session)


@pytest_asyncio.fixture(loop_scope="module")
async def upstream_alone() -> AsyncIterator[Talker]:
    async with Talker() as upstream:
        yield upstream


_talker = ""
_unused_talkers = iter(TALKERS)


@pytest.fixture(autouse=True)
def own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's requests are for unless they say another."""
    monkeypatch.setattr("tests.acceptance.test_streams._talker", next(_unused_talkers))


def _config(base_url: str) -> dict[str, Any]:
    plans = {"prepaid": {"default": True}}
    config = gateway_config(base_url, [*TALKERS, THINKER, BY_BYTES, BY_USAGE, BY_MAXIMUM], plans=plans)
    models = config["models"]["models"]
    models[THINKER]["hidden_reasoning"] = True
    for name in (BY_BYTES, BY_USAGE, BY_MAXIMUM):
        config["upstreams"][name] = {"base_url": base_url, "count_output": name.removeprefix("by-")}
        models[name]["upstream"] = name
    return config


def body_of(
    words: int,
    *,
    model: str | None = None,
    max_tokens: int = MAX_TOKENS,
    fields: dict[str, Any] | None = None,
    **plan: Any,
) -> bytes:
    """A streamed chat request that asks for usage; plan: what the upstream is to do besides."""
    body = {
        "model": model or _talker,
        "messages": [{"role": "user", "content": "Hello!"}],
        "user": json.dumps({"words": words, **plan}),
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(fields or {}),
    }
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def covered_by(held: Decimal, body: bytes) -> int:
    """The output tokens that a hold covers beside the input."""
    rest = held * 1_000_000 - input_bound(body) * INPUT_PRICE
    return int((rest / OUTPUT_PRICE).to_integral_value(ROUND_FLOOR))


def estimated_input(body: bytes) -> int:
    """Input tokens that are charged where the upstream reports none."""
    return -(-(input_bound(body) - 256) // 4)


def text_of(answer: Answer, index: int = 0) -> str:
    choices = [choice for event in answer.events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def finishes_of(answer: Answer) -> dict[int, list[str]]:
    """Every finish reason that was given, by answer."""
    finishes: dict[int, list[str]] = defaultdict(list)
    for event in answer.events:
        for choice in event["choices"]:
            if choice["finish_reason"]:
                finishes[choice["index"]].append(choice["finish_reason"])
    return dict(finishes)


def quota_of(answer: Answer) -> dict[str, Any]:
    """The one reason that the last chunks give."""
    said = [event["quota"] for event in answer.events if "quota" in event]
    assert said
    assert all(quota == said[0] for quota in said)
    return dict(said[0])


async def told_of(upstream: Talker, name: str) -> Told:
    """The request that was made under this name, once it has come."""
    async with asyncio.timeout(SECONDS):
        while True:
            for told in upstream.told:
                if json.loads(told.body["user"]).get("name") == name:
                    return told
            await asyncio.sleep(0.01)


def other_hold(name: str, model: str | None = None) -> Decimal:
    """What held_by_another's stream holds."""
    return hold_of(_other(name, model), MAX_TOKENS if model == THINKER else SLICE)


def _other(name: str, model: str | None) -> bytes:
    return body_of(20, model=model, name=name, pause_at=10)


async def held_by_another(bench: Bench, account: Account, name: str, model: str | None = None) -> asyncio.Task[Answer]:
    """Another stream of the account, which holds what it first held until ``go(name)``."""
    task = account.start(_other(name, model))
    await account.wait_for(other_hold(name, model))
    return task


# --- a little, and more as it flows ----------------------------------------------------------------------------------


async def test_many_streams_share_credits_that_would_not_hold_two_at_their_maximum(bench: Bench) -> None:
    bodies = [body_of(20, name=f"many{number:02}", pause_at=10) for number in range(10)]
    hold = hold_of(bodies[0], SLICE)
    # An eleventh would leave less than an eighth of what the ten hold for them to grow.
    account = bench.account(12 * hold)
    assert 12 * hold < 2 * hold_of(bodies[0], MAX_TOKENS)
    tasks = [account.start(body) for body in bodies]
    await account.wait_for(10 * hold)
    refused = await account.ask(body_of(20))
    assert (refused.status, refused.error["code"]) == (429, "credits_in_flight")
    assert refused.headers["Retry-After"] == "1"
    for number in range(10):
        bench.upstream.go(f"many{number:02}")
    for answer in await asyncio.gather(*tasks):
        assert (answer.status, text_of(answer)) == (200, WORD * 20)
        assert Decimal(answer.headers["x-credits-reserved"]) == hold
        assert finishes_of(answer) == {0: ["stop"]}
    assert await account.idle_balance() == 12 * hold - 10 * cost_of(PROMPT_TOKENS, 20)


async def test_a_stream_longer_than_its_first_slice_goes_on_and_is_charged_exactly(bench: Bench) -> None:
    account, body = bench.account(PLENTY), body_of(1500)
    answer = await account.ask(body)
    assert (answer.status, text_of(answer)) == (200, WORD * 1500)
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(body, SLICE)
    assert "x-credits-max-tokens" not in answer.headers
    assert answer.events[-1]["usage"]["completion_tokens"] == 1500
    cost = cost_of(PROMPT_TOKENS, 1500)
    assert Decimal(answer.events[-1]["usage"]["credits"]["cost"]) == cost
    assert await account.idle_balance() == PLENTY - cost
    assert Decimal((await bench.log_of(answer))["reserved"]) > hold_of(body, SLICE)


@pytest.mark.parametrize("model", [BY_BYTES, BY_USAGE])
async def test_whatever_counts_the_output_the_charge_is_the_upstreams_usage(bench: Bench, model: str) -> None:
    account = bench.account(PLENTY)
    answer = await account.ask(body_of(1500, model=model))
    assert text_of(answer) == WORD * 1500
    assert [event["usage"]["completion_tokens"] for event in answer.events if event.get("usage")] == [1500]
    assert await account.idle_balance() == PLENTY - cost_of(PROMPT_TOKENS, 1500)


@pytest.mark.parametrize("model", [THINKER, BY_MAXIMUM])
async def test_what_cannot_be_counted_holds_its_maximum(bench: Bench, model: str) -> None:
    account, body = bench.account(PLENTY), body_of(20, model=model)
    answer = await account.ask(body)
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(body, MAX_TOKENS)
    assert await account.idle_balance() == PLENTY - cost_of(PROMPT_TOKENS, 20)


async def test_a_request_that_is_not_streamed_holds_its_maximum(bench: Bench) -> None:
    account = bench.account(PLENTY)
    body = body_of(20, fields={"stream": None, "stream_options": None})
    answer = await account.ask(body)
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(body, MAX_TOKENS)


async def test_a_stream_that_is_alone_ends_at_the_upstreams_own_limit(bench: Bench) -> None:
    body = body_of(MAX_TOKENS)
    account = bench.account(hold_of(body, 700))
    answer = await account.ask(body)
    assert answer.headers["x-credits-max-tokens"] == "700"
    assert bench.upstream.told[-1].body["max_tokens"] == 700
    assert text_of(answer) == WORD * 700
    assert finishes_of(answer) == {0: ["length"]}
    assert not any("quota" in event for event in answer.events)
    assert await account.idle_balance() == hold_of(body, 700) - cost_of(PROMPT_TOKENS, 700)


async def test_alone_less_than_a_slice_is_enough(bench: Bench) -> None:
    body = body_of(MAX_TOKENS)
    account = bench.account(hold_of(body, 40))
    answer = await account.ask(body)
    assert (answer.status, text_of(answer)) == (200, WORD * 40)
    assert answer.headers["x-credits-max-tokens"] == "40"


async def test_at_a_reduced_rate_too_the_limit_is_what_all_credits_pay(
    upstream_alone: Talker, tmp_path: Path, module_clock: MovableClock
) -> None:
    plan = {"default": True, "allowance": {"per_window": "0.0005", "refresh": "24h"}, "rate": "0.9", "payg": False}
    config = gateway_config(upstream_alone.base_url, [_talker], plans={"reduced": plan})
    async with aiohttp.ClientSession() as session:
        with running_gateway(config, data_dir=tmp_path / "data", clock=module_clock) as gateway:
            for number in range(10):
                key = new_account(gateway, f"r{number}", "reduced")
                account = Account(gateway, session, f"r{number}", key)
                answer = await account.ask(body_of(MAX_TOKENS, padding="x" * number))
                limit = int(answer.headers["x-credits-max-tokens"])
                assert text_of(answer) == WORD * limit
                assert not any("quota" in event for event in answer.events)
                assert account.funds.used == cost_of(PROMPT_TOKENS, limit, rate="0.9")


# --- credits end -----------------------------------------------------------------------------------------------------


async def test_a_stream_whose_credits_end_ends_well(bench: Bench) -> None:
    body = body_of(MAX_TOKENS, name="cut", stop_at=950)
    grant = other_hold("cut-other") + hold_of(body, 900)
    account = bench.account(grant)
    before = await bench.truncated()
    other = await held_by_another(bench, account, "cut-other")
    async with openai.AsyncOpenAI(base_url=bench.gateway.base_url, api_key=account.key, max_retries=0) as client:
        stream = await client.chat.completions.create(**json.loads(body))
        chunks = [chunk async for chunk in stream]
    *_, last_word, finish, usage = chunks
    assert last_word.choices[0].delta.content == WORD
    assert (finish.id, finish.model, finish.created) == (last_word.id, last_word.model, last_word.created)
    assert finish.choices[0].finish_reason == "length"
    quota = (finish.model_extra or {})["quota"]
    assert (quota["ended_by"], quota["code"]) == ("credits", "insufficient_quota")
    assert usage.choices == []
    assert usage.usage.completion_tokens == 900
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == WORD * 900
    told = await told_of(bench.upstream, "cut")
    async with asyncio.timeout(SECONDS):
        await told.over.wait()
    assert told.left
    assert await bench.truncated() == before + 1
    bench.upstream.go("cut-other")
    assert text_of(await other) == WORD * 20
    cost = cost_of(usage.usage.prompt_tokens, 900)
    assert usage.usage.prompt_tokens == estimated_input(body)
    assert Decimal(usage.usage.model_extra["credits"]["cost"]) == cost
    assert await account.idle_balance() == grant - cost - cost_of(PROMPT_TOKENS, 20)


async def test_the_log_says_why_it_ended(bench: Bench) -> None:
    body = body_of(MAX_TOKENS, fields={"stream_options": None})
    account = bench.account(other_hold("log-other") + hold_of(body, 300))
    other = await held_by_another(bench, account, "log-other")
    answer = await account.ask(body)
    assert not any(event.get("usage") for event in answer.events)
    assert quota_of(answer)["resets_at"] is None
    line = await bench.log_of(answer)
    assert (line["status"], line["reason"]) == (200, "credits_exhausted")
    assert Decimal(line["cost"]) == cost_of(estimated_input(body), 300)
    bench.upstream.go("log-other")
    await other


async def test_of_several_answers_each_that_is_open_is_ended(bench: Bench) -> None:
    body = body_of(0, each=[100, MAX_TOKENS, MAX_TOKENS], fields={"n": 3})
    # All that is free: the first slices of three answers, and 600 tokens more.
    free = cost_of(input_bound(body), 3 * SLICE + 600)
    account = bench.account(other_hold("several-other", THINKER) + free)
    other = await held_by_another(bench, account, "several-other", THINKER)
    answer = await account.ask(body)
    assert finishes_of(answer) == {0: ["stop"], 1: ["length"], 2: ["length"]}
    assert quota_of(answer)["code"] == "insufficient_quota"
    words = sum(len(text_of(answer, index)) // len(WORD) for index in range(3))
    assert words == answer.events[-1]["usage"]["completion_tokens"] == 3 * SLICE + 600
    bench.upstream.go("several-other")
    await other


async def test_a_text_completion_is_ended_in_its_own_shape(bench: Bench) -> None:
    body = body_of(MAX_TOKENS, fields={"messages": None, "prompt": "Hello!"})
    account = bench.account(other_hold("text-other") + hold_of(body, 300))
    other = await held_by_another(bench, account, "text-other")
    answer = await account.ask(body, "/completions")
    assert text_of(answer) == WORD * 300
    finish = next(event for event in answer.events if "quota" in event)
    assert finish["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
    bench.upstream.go("text-other")
    await other


async def test_an_extension_that_was_refused_is_granted_once_another_stream_ends(bench: Bench) -> None:
    body = body_of(600, name="late", pause_at=290)
    grant = other_hold("late-other") + hold_of(body, 300)
    account = bench.account(grant)
    other = await held_by_another(bench, account, "late-other")
    task = account.start(body)
    await account.wait_for(grant)  # it has taken all that was free, and is refused more
    bench.upstream.go("late-other")
    await other
    bench.upstream.go("late")
    answer = await task
    assert text_of(answer) == WORD * covered_by(grant - cost_of(PROMPT_TOKENS, 20), body)
    assert len(text_of(answer)) > 300 * len(WORD)
    quota_of(answer)


# --- what else can happen meanwhile ----------------------------------------------------------------------------------


async def test_an_upstream_that_breaks_after_an_extension_is_not_paid(bench: Bench) -> None:
    account = bench.account(PLENTY)
    async with asyncio.timeout(SECONDS):
        async with bench.session.post(
            account.gateway.base_url + "/chat/completions",
            data=body_of(MAX_TOKENS, fail_at=700),
            headers=account.headers(),
        ) as response:
            last = (await response.read()).rstrip().splitlines()[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_unavailable"
    assert await account.idle_balance() == PLENTY


async def test_who_leaves_while_the_hold_is_extended_pays_for_what_was_sent(bench: Bench) -> None:
    account = bench.account(PLENTY)
    body = body_of(MAX_TOKENS, name="leaver", pause_at=100, stop_at=300)
    async with bench.session.post(
        account.gateway.base_url + "/chat/completions", data=body, headers=account.headers()
    ) as response:
        await response.content.readline()
        with hanging_store(bench.gateway):
            bench.upstream.go("leaver")
            received = await _read_until_silence(response)
            assert received.count(b'"content"') == SLICE - 1  # no more than was held for
            response.close()
            told = await told_of(bench.upstream, "leaver")
            async with asyncio.timeout(SECONDS):
                await told.over.wait()
    assert await account.idle_balance() == PLENTY - cost_of(estimated_input(body), SLICE)


async def _read_until_silence(response: aiohttp.ClientResponse) -> bytes:
    """What comes until nothing has come for a while."""
    received = b""
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.5):
                received += await response.content.readany()
    return received


async def test_a_stream_ends_in_an_error_when_the_store_stays_away(bench: Bench) -> None:
    account = bench.account(PLENTY)
    body = body_of(MAX_TOKENS, name="stranded", pause_at=100)
    async with bench.session.post(
        account.gateway.base_url + "/chat/completions", data=body, headers=account.headers()
    ) as response:
        await response.content.readline()
        with hanging_store(bench.gateway):
            bench.upstream.go("stranded")
            async with asyncio.timeout(SECONDS):
                received = await response.read()
    last = received.rstrip().splitlines()[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "quota_store_unavailable"
    assert received.count(b'"content"') == SLICE - 1
    assert await account.idle_balance() == PLENTY - cost_of(estimated_input(body), SLICE)


async def test_a_stream_survives_a_store_that_is_away_for_a_moment(bench: Bench) -> None:
    account = bench.account(PLENTY)
    body = body_of(1000, name="patient", pause_at=100)
    task = account.start(body)
    await account.wait_for(hold_of(body, SLICE))
    with hanging_store(bench.gateway):
        bench.upstream.go("patient")
        await asyncio.sleep(1)
    assert text_of(await task) == WORD * 1000
    assert await account.idle_balance() == PLENTY - cost_of(PROMPT_TOKENS, 1000)


# --- Idempotency-Key -------------------------------------------------------------------------------------------------


async def test_a_key_that_was_answered_is_not_run_again(bench: Bench) -> None:
    account, body = bench.account(PLENTY), body_of(20)
    first = await account.ask(body, **{"Idempotency-Key": "order-1"})
    before = len(bench.upstream.told)
    again = await account.ask(body, **{"Idempotency-Key": "order-1"})
    assert (again.status, again.error["code"]) == (409, "idempotency_answered")
    assert again.headers["x-should-retry"] == "false"
    assert again.error["metadata"]["request_id"] == first.headers["x-request-id"]
    assert Decimal(again.error["metadata"]["cost"]) == cost_of(PROMPT_TOKENS, 20)
    other = await account.ask(body_of(21), **{"Idempotency-Key": "order-1"})
    assert (other.status, other.error["code"]) == (422, "idempotency_other_body")
    assert other.headers["x-should-retry"] == "false"
    assert len(bench.upstream.told) == before
    assert await account.idle_balance() == PLENTY - cost_of(PROMPT_TOKENS, 20)
    stranger = bench.account(PLENTY)
    assert (await stranger.ask(body, **{"Idempotency-Key": "order-1"})).status == 200


async def test_a_key_whose_request_is_being_answered_has_to_wait(bench: Bench) -> None:
    account, body = bench.account(PLENTY), body_of(20, name="slow", pause_at=10)
    task = asyncio.create_task(account.ask(body, **{"Idempotency-Key": "order-2"}))
    await account.wait_for(hold_of(body, SLICE))
    again = await account.ask(body, **{"Idempotency-Key": "order-2"})
    assert (again.status, again.error["code"]) == (409, "idempotency_in_progress")
    assert again.headers["Retry-After"] == "1"
    assert "x-should-retry" not in again.headers
    bench.upstream.go("slow")
    assert (await task).status == 200


async def test_a_key_whose_request_failed_may_be_used_again(bench: Bench) -> None:
    account = bench.account(PLENTY)
    body = body_of(20, fail_at=0)
    for _ in range(2):
        answer = await account.ask(body, **{"Idempotency-Key": "order-3"})
        assert (answer.status, answer.error["code"]) == (502, "upstream_unavailable")
    assert await account.idle_balance() == PLENTY


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "schlüssel"])
async def test_a_key_that_is_none_is_refused_by_name(bench: Bench, key: str) -> None:
    answer = await bench.account(PLENTY).ask(body_of(20), **{"Idempotency-Key": key})
    assert (answer.status, answer.error["code"]) == (400, "invalid_idempotency_key")
    assert "Idempotency-Key" in answer.error["message"]


# --- a real server ---------------------------------------------------------------------------------------------------


async def test_real_streams_are_extended_cut_and_charged(llama: str, tmp_path: Path) -> None:
    config = gateway_config(llama, [MODEL_NAME], plans={"prepaid": {"default": True}})
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 1000,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    raw = json.dumps(body).encode()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        with running_gateway(config, data_dir=tmp_path / "data") as gateway:
            rich = Account(gateway, session, "rich", new_account(gateway, "rich", "prepaid", grant=PLENTY))
            answer = await rich.ask(raw)
            usage = answer.events[-1]["usage"]
            assert (usage["completion_tokens"], finishes_of(answer)) == (1000, {0: ["length"]})
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert await rich.idle_balance() == PLENTY - cost_of(usage["prompt_tokens"], 1000, cached)

            # Enough for a slice each, and for half of what both want.
            grant = 2 * hold_of(raw, 500)
            poor = Account(gateway, session, "poor", new_account(gateway, "poor", "prepaid", grant=grant))
            answers = await asyncio.gather(poor.ask(raw), poor.ask(raw))
            assert all(finishes_of(answer) == {0: ["length"]} for answer in answers)
            assert any("quota" in event for answer in answers for event in answer.events)
            costs = [Decimal(answer.events[-1]["usage"]["credits"]["cost"]) for answer in answers]
            assert await poor.idle_balance() == grant - sum(costs) >= 0
            assert "wrote off" not in gateway.stderr
