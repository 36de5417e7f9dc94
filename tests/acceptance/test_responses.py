"""The openai SDK's ``client.responses`` through the real gateway process: exact charges, and streams that end well."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from openai import APIError, AsyncOpenAI, BadRequestError, OpenAI

from tests.acceptance.conftest import TEMPLATE_TOKENS, Funds, funds_of, new_account
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock
from tests.upstreams.llama import MODEL_NAME
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: A gateway learns how long a model's answers are: so every test has a model of its own.
SPEAKERS = [f"speaker-{number:02}" for number in range(40)]
CONTEXT = 4096
MAX_TOKENS = 2000
PROMPT_TOKENS, CACHED_TOKENS = 20, 8
WORD = " w"
SECONDS = 30
PLENTY = Decimal(1)


# --- the upstream ----------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """One request as the upstream saw it. left: the client went away before the end."""

    body: dict[str, Any]
    left: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def input_bound(self) -> int:
        """The most input tokens that it can have."""
        return self._size + TEMPLATE_TOKENS

    @property
    def estimated_input(self) -> int:
        """What is charged where the upstream reports none."""
        return -(-self._size // 4)

    @property
    def _size(self) -> int:
        asked = {name: value for name, value in self.body.items() if name != "max_output_tokens"}
        return len(json.dumps(asked, separators=(",", ":"), ensure_ascii=False).encode())


class Speaker(LocalUpstream):
    """A stand-in for a server of the Responses API: it speaks the protocol, and says as many words as it is told to,
    each a token and an event.

    The request's ``user`` field is JSON: words; kind: what it answers with, a message, a call or reasoning; wait: it
    waits for ``go(wait)`` before it answers; fail_at: how many words before it breaks; stop_at: how many before it
    waits for its client to leave; ending: how it ends.
    """

    def __init__(self) -> None:
        super().__init__(web.post("/v1/responses", self._answer))
        self.told: list[Told] = []
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def go(self, name: str) -> None:
        """Let the requests that wait for name go on."""
        self._gates[name].set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        told = Told(await request.json())
        self.told.append(told)
        plan = {"words": 10, "kind": "message", "ending": "completed", **json.loads(told.body.get("user", "{}"))}
        if "wait" in plan:
            await self._gates[plan["wait"]].wait()
        plan["words"] = min(plan["words"], told.body["max_output_tokens"])
        if not told.body.get("stream"):
            return web.json_response(_response(plan, plan["ending"], [_item(plan, WORD * plan["words"])]))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await self._speak(request, response, plan)
        except (ConnectionError, asyncio.CancelledError):
            told.left = True
            raise
        finally:
            told.over.set()
        return response

    async def _speak(self, request: web.Request, response: web.StreamResponse, plan: dict[str, Any]) -> None:
        await response.prepare(request)
        number = count()

        async def say(kind: str, **members: Any) -> None:
            event = {"type": kind, "sequence_number": next(number), **members}
            await response.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())

        stem, index = _STEMS[plan["kind"]]
        where: dict[str, Any] = {"item_id": "item_1", "output_index": 0, **({index: 0} if index else {})}
        await say("response.created", response=_response(plan, "in_progress", []))
        await say("response.output_item.added", output_index=0, item=_item(plan, None))
        if index:
            name = "reasoning_summary_part" if plan["kind"] == "reasoning" else "content_part"
            await say(f"response.{name}.added", **where, part=_part(plan, ""))
        for word in range(plan["words"]):
            if word == plan.get("fail_at"):
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError
            if word == plan.get("stop_at"):
                await asyncio.Event().wait()
            await say(f"response.{stem}.delta", **where, delta=WORD, logprobs=[])
            await asyncio.sleep(0)
        text = WORD * plan["words"]
        await say(f"response.{stem}.done", **where, **{"arguments" if plan["kind"] == "call" else "text": text})
        if index:
            await say(f"response.{name}.done", **where, part=_part(plan, text))
        await say("response.output_item.done", output_index=0, item=_item(plan, text))
        match plan["ending"]:
            case "completed" | "incomplete" | "failed":
                await say(f"response.{plan['ending']}", response=_response(plan, plan["ending"], [_item(plan, text)]))
            case "error":
                await say("error", code="server_error", message="it broke", param=None)
            case "error_object":
                await say("error", error={"type": "server_error", "code": None, "message": "it broke", "param": None})
        if plan["ending"] in ("done_mark", "completed"):
            await response.write(b"data: [DONE]\n\n")


_STEMS = {
    "message": ("output_text", "content_index"),
    "reasoning": ("reasoning_summary_text", "summary_index"),
    "call": ("function_call_arguments", ""),
}


def _part(plan: dict[str, Any], text: str) -> dict[str, Any]:
    if plan["kind"] == "reasoning":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _item(plan: dict[str, Any], text: str | None) -> dict[str, Any]:
    """text: None for an item that begins."""
    parts = [] if text is None else [_part(plan, text)]
    status = "in_progress" if text is None else "completed"
    match plan["kind"]:
        case "call":
            call = {"call_id": "call_1", "name": "f", "arguments": text or ""}
            return {"id": "item_1", "type": "function_call", "status": status, **call}
        case "reasoning":
            return {"id": "item_1", "type": "reasoning", "summary": parts}
    return {"id": "item_1", "type": "message", "role": "assistant", "status": status, "content": parts}


def _response(plan: dict[str, Any], status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    usage = {
        "input_tokens": PROMPT_TOKENS,
        "input_tokens_details": {"cached_tokens": CACHED_TOKENS},
        "output_tokens": plan["words"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT_TOKENS + plan["words"],
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "speaker",
        "status": status,
        "error": {"code": "server_error", "message": "it broke"} if status == "failed" else None,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if status in ("completed", "incomplete", "failed") else None,
    }


def cost_of_words(words: int) -> Decimal:
    """The price of the usage that the upstream reports."""
    return cost_of(PROMPT_TOKENS, words, CACHED_TOKENS)


# --- the bench -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A prepaid account, whose balance is all that it has, and the SDK with its key."""

    gateway: Gateway
    name: str
    client: AsyncOpenAI
    grant: Decimal

    @property
    def funds(self) -> Funds:
        return funds_of(self.gateway, self.name)

    async def spent(self) -> Decimal:
        """What is gone of the grant, once nothing is held."""
        async with asyncio.timeout(SECONDS):
            while (funds := self.funds).balance_held:
                await asyncio.sleep(0.02)
        return self.grant - funds.balance


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Speaker
    numbers: Any = field(default_factory=count)

    @asynccontextmanager
    async def account(self, grant: Decimal = PLENTY) -> AsyncIterator[Account]:
        name = f"a{next(self.numbers)}"
        key = new_account(self.gateway, name, "prepaid", grant=grant)
        async with AsyncOpenAI(base_url=self.gateway.base_url, api_key=key, max_retries=0, timeout=SECONDS) as client:
            yield Account(self.gateway, name, client, grant)

    @asynccontextmanager
    async def short_of(self, tokens: int, body: dict[str, Any]) -> AsyncIterator[Account]:
        """An account with credits for so many tokens of an answer to body, and others that another request holds."""
        # Of what others hold an eighth must stay free for them to grow: so it is little.
        other = {**asked(10, wait=f"other-{next(self.numbers)}"), "max_output_tokens": 100}
        free = cost_of(Told(body).input_bound, tokens)
        held = cost_of(Told(other).input_bound, 100)
        async with self.account(free + held) as account:
            task = asyncio.create_task(account.client.responses.create(**other))
            async with asyncio.timeout(SECONDS):
                while account.funds.balance_held != held:
                    await asyncio.sleep(0.02)
            try:
                yield account
            finally:
                self.upstream.go(json.loads(other["user"])["wait"])
                await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with Speaker() as upstream:
        config = gateway_config(upstream.base_url, SPEAKERS, plans={"prepaid": {"default": True}})
        with running_gateway(config, data_dir=tmp_path_factory.mktemp("responses") / "data") as gateway:
            yield Bench(gateway, upstream)


_speaker = ""
_unused_speakers = iter(SPEAKERS)


@pytest.fixture(autouse=True)
def own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's requests are for."""
    monkeypatch.setattr("tests.acceptance.test_responses._speaker", next(_unused_speakers))


def asked(words: int, **plan: Any) -> dict[str, Any]:
    """A request; plan: what the upstream is to do besides."""
    user = json.dumps({"words": words, **plan})
    return {"model": _speaker, "input": "Hello!", "user": user, "max_output_tokens": MAX_TOKENS}


def streamed(words: int, **plan: Any) -> dict[str, Any]:
    return {**asked(words, **plan), "stream": True}


def cost_in(usage: Any) -> Decimal:
    """What the last event says that the stream cost."""
    extra = usage.model_extra
    assert Decimal(str(extra["cost"])).quantize(Decimal("1e-9")) == Decimal(extra["credits"]["cost"])
    return Decimal(extra["credits"]["cost"])


# --- what is charged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["completed", "incomplete"])
async def test_an_answer_costs_its_usage(bench: Bench, ending: str) -> None:
    async with bench.account() as account:
        raw = await account.client.responses.with_raw_response.create(**asked(10, ending=ending))
        answer = raw.parse()
        assert (answer.status, answer.output_text) == (ending, WORD * 10)
        told = bench.upstream.told[-1]
        assert told.body["max_output_tokens"] == MAX_TOKENS
        assert Decimal(raw.headers["x-credits-cost"]) == cost_of_words(10)
        assert Decimal(raw.headers["x-credits-reserved"]) == cost_of(told.input_bound, MAX_TOKENS)
        assert await account.spent() == cost_of_words(10)


async def test_an_answer_that_failed_costs_nothing(bench: Bench) -> None:
    async with bench.account() as account:
        with pytest.raises(APIError) as failure:
            await account.client.responses.create(**asked(10, ending="failed"))
        assert failure.value.code == "upstream_unavailable"
        assert await account.spent() == 0


@pytest.mark.parametrize("kind", ["message", "call", "reasoning"])
async def test_a_stream_costs_its_usage_and_says_so(bench: Bench, kind: str) -> None:
    async with bench.account() as account:
        async with await account.client.responses.create(**streamed(600, kind=kind)) as stream:
            events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert sum(event.type.endswith(".delta") for event in events) == 600
        assert events[-1].type == "response.completed"
        assert events[-1].response.usage.output_tokens == 600
        assert cost_in(events[-1].response.usage) == cost_of_words(600)
        assert await account.spent() == cost_of_words(600)


async def test_the_sdks_own_stream_puts_the_answer_together(bench: Bench) -> None:
    async with bench.account() as account:
        async with account.client.responses.stream(**asked(20)) as stream:
            snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
            answer = await stream.get_final_response()
        assert snapshots == [WORD * number for number in range(1, 21)]
        assert answer.output_text == WORD * 20
        assert cost_in(answer.usage) == await account.spent() == cost_of_words(20)


async def test_what_credits_pay_limits_the_answer(bench: Bench) -> None:
    body = asked(MAX_TOKENS)
    async with bench.account(cost_of(Told(body).input_bound, 700)) as account:
        raw = await account.client.responses.with_raw_response.create(**body)
        assert raw.headers["x-credits-max-tokens"] == "700"
        assert bench.upstream.told[-1].body["max_output_tokens"] == 700
        assert await account.spent() == cost_of_words(700)


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_0"},
        {"conversation": "conv_1"},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://example.com/1.png"}]}]},
    ],
)
async def test_what_is_not_in_the_request_may_fill_the_context_window(bench: Bench, fields: dict[str, Any]) -> None:
    async with bench.account() as account:
        raw = await account.client.responses.with_raw_response.create(**{**asked(10), **fields})
        assert Decimal(raw.headers["x-credits-reserved"]) == cost_of(CONTEXT, MAX_TOKENS)
        assert await account.spent() == cost_of_words(10)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[0].type"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
async def test_what_has_another_price_is_refused(bench: Bench, fields: dict[str, Any], param: str) -> None:
    before = len(bench.upstream.told)
    async with bench.account() as account:
        with pytest.raises(BadRequestError) as refused:
            await account.client.responses.create(**asked(10), **fields)
        assert refused.value.param == param
        assert len(bench.upstream.told) == before
        assert await account.spent() == 0


# --- when credits end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["message", "call", "reasoning"])
async def test_a_stream_whose_credits_end_ends_well(bench: Bench, kind: str) -> None:
    """The name of a call is output too, a token of it. Half a call is never done, for a client would run it."""
    body = streamed(MAX_TOKENS, kind=kind, stop_at=950)
    words = 899 if kind == "call" else 900
    async with bench.short_of(900, body) as account:
        async with await account.client.responses.create(**body) as stream:
            events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert sum(event.type.endswith(".delta") for event in events) == words
        end, told = events[-1], bench.upstream.told[-1]
        assert (events[-2].type == "response.output_item.done") is (kind != "call")
        assert end.type == "response.incomplete"
        assert (end.response.id, end.response.status) == ("resp_1", "incomplete")
        assert end.response.incomplete_details.reason == "max_output_tokens"
        assert _said_in(end.response.output) == WORD * words
        assert kind == "call" or end.response.output == [events[-2].item]
        assert end.model_extra["quota"]["code"] == "insufficient_quota"
        usage = end.response.usage
        assert (usage.input_tokens, usage.output_tokens) == (told.estimated_input, 900)
        cost = cost_in(usage)
        assert cost == cost_of(told.estimated_input, 900)
        async with asyncio.timeout(SECONDS):
            await told.over.wait()
        assert told.left
    assert await account.spent() == cost + cost_of_words(10)


def _said_in(output: list[Any]) -> str:
    (item,) = output
    match item.type:
        case "function_call":
            return str(item.arguments)
        case "reasoning":
            return str(item.summary[0].text)
    return str(item.content[0].text)


async def test_the_sdks_own_stream_understands_the_end(bench: Bench) -> None:
    body = asked(MAX_TOKENS)
    async with (
        bench.short_of(300, {**body, "stream": True}) as account,
        account.client.responses.stream(**body) as stream,
    ):
        events = [event async for event in stream]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[-4].text == WORD * 300
    assert events[-1].response.output_text == WORD * 300


# --- when the upstream fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [{"fail_at": 5}, {"ending": "none"}, {"ending": "done_mark"}])
async def test_a_stream_that_breaks_off_is_an_error_and_costs_nothing(bench: Bench, plan: dict[str, Any]) -> None:
    async with bench.account() as account:
        for body in (streamed(10, **plan), asked(10, **plan)):
            with pytest.raises(APIError) as failure:
                if "stream" in body:
                    async with await account.client.responses.create(**body) as stream:
                        assert [event.type async for event in stream]
                else:
                    async with account.client.responses.stream(**body) as stream:
                        assert [event.type async for event in stream]
            assert failure.value.code == "upstream_unavailable"
        assert await account.spent() == 0


async def test_a_broken_stream_ends_in_an_error_of_the_apis_own_form(bench: Bench) -> None:
    async with bench.account() as account:
        body = streamed(10, fail_at=5)
        async with account.client.responses.with_streaming_response.create(**body) as raw:
            lines = [line async for line in raw.iter_lines() if line]
        assert lines[-2] == "event: error"
        error = json.loads(lines[-1].removeprefix("data: "))
        assert (error["type"], error["code"], error["param"]) == ("error", "upstream_unavailable", None)
        assert error["message"] == error["error"]["message"]
        assert error["sequence_number"] == len(lines) // 2 - 1


async def test_a_failure_that_the_upstream_tells_is_shown_as_it_came(bench: Bench) -> None:
    async with bench.account() as account:
        for ending, kind in (("failed", "response.failed"), ("error", "error")):
            async with await account.client.responses.create(**streamed(10, ending=ending)) as stream:
                events = [event async for event in stream]
            assert events[-1].type == kind
            assert "it broke" in events[-1].to_json()
        with pytest.raises(APIError, match="it broke"):
            async with await account.client.responses.create(**streamed(10, ending="error_object")) as stream:
                assert [event async for event in stream]
        assert await account.spent() == 0


async def test_who_leaves_pays_for_what_was_sent(bench: Bench) -> None:
    async with bench.account() as account:
        stream = await account.client.responses.create(**streamed(MAX_TOKENS, stop_at=5))
        deltas = (event async for event in stream if event.type.endswith(".delta"))
        for _ in range(5):
            await anext(deltas)
        await stream.close()
        assert await account.spent() == cost_of(bench.upstream.told[-1].estimated_input, 5)


# --- a real server ---------------------------------------------------------------------------------------------------


async def test_a_real_server_is_charged_by_its_usage(llama: str, tmp_path: Path, module_clock: MovableClock) -> None:
    """It tells neither places nor numbers in its events."""

    def ask_twice() -> None:
        config = gateway_config(llama, [MODEL_NAME])
        asking: Any = {"model": MODEL_NAME, "input": "Tell me about the sea.", "max_output_tokens": 300}
        with (
            running_gateway(config, data_dir=tmp_path / "data", clock=module_clock) as gateway,
            OpenAI(base_url=gateway.base_url, api_key=gateway.key, max_retries=0) as client,
        ):
            raw = client.responses.with_raw_response.create(**asking)
            whole = raw.parse()
            first = _cost_of_usage(whole.usage)
            assert Decimal(raw.headers["x-credits-cost"]) == first
            *events, end = list(client.responses.create(**asking, stream=True))
            said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert said == end.response.output_text
            assert end.response.usage.output_tokens == 300
            second = _cost_of_usage(end.response.usage)
            assert cost_in(end.response.usage) == second
            assert funds_of(gateway).used == first + second

    await asyncio.to_thread(ask_twice)


def _cost_of_usage(usage: Any) -> Decimal:
    return cost_of(usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens)
