"""POST /v1/messages through the real gateway process, as the ``anthropic`` SDK uses it.

The upstream is a small stand-in of this module, which says of itself what the real API would: the kinds of cached
input, thinking, calls of tools. That a real server is charged right is shown with llama.cpp, at the end.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import ROUND_CEILING, Decimal
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest
import pytest_asyncio
from aiohttp import web

from tests.acceptance.conftest import NOON, TEMPLATE_TOKENS, Answer, at, funds_of, new_account
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock
from tests.upstreams.llama import MODEL_NAME
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: A gateway learns how long a model's answers are: so every test has a model of its own.
WRITERS = [f"writer-{number:02}" for number in range(40)]
#: One whose cache costs something to write.
CACHED = "cached"
CACHE_WRITE_PRICE = Decimal("0.038125")
FRESH_TOKENS, READ_TOKENS, WRITTEN_TOKENS = 20, 30, 40
INPUT_TOKENS = FRESH_TOKENS + READ_TOKENS + WRITTEN_TOKENS
WORD = " w"
MAX_TOKENS = 2000
#: What a stream of a model that nothing is known of holds first.
SLICE = 256
SECONDS = 30
PLENTY = Decimal(1)
#: What the plan "daily" grants a day.
DAILY = Decimal("0.0005")
#: So many that it pays for them once, and for less than an answer more.
DAILY_WORDS = 620
BODY_BYTES = 20_000


# --- the upstream ----------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """One request as the upstream saw it. left: the client went away before the end."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    query: str
    left: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Writer(LocalUpstream):
    """A stand-in for Anthropic's API: it writes as many words as the request's ``metadata.user_id`` asks for, each a
    token and an event.

    ``user_id`` is JSON: words; name; pause_at: how many words before it waits for ``go(name)``; stop_at: how many
    before it waits for its client to leave; fail_at, end_at, error_at: how many before it breaks off, ends without an
    end, or sends an error; thinks, calls: whether it thinks before, or calls a tool afterwards; status and type: those
    of an error instead of an answer.
    """

    def __init__(self) -> None:
        super().__init__(web.post("/v1/messages", self._answer))
        self.told: list[Told] = []
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def go(self, name: str) -> None:
        """Let the requests that wait for name go on."""
        self._gates[name].set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        told = Told(await request.json(), request.headers.copy(), request.query_string)
        self.told.append(told)
        plan = json.loads(told.body["metadata"]["user_id"])
        if status := plan.get("status"):
            error = {"type": plan["type"], "message": "The stand-in refuses."}
            return web.json_response({"type": "error", "error": error, "request_id": "req_1"}, status=status)
        if not told.body.get("stream"):
            return self._whole(told, plan)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await self._write(request, response, told, plan)
        except (ConnectionError, asyncio.CancelledError):
            told.left = True
            raise
        finally:
            told.over.set()
        return response

    def _whole(self, told: Told, plan: dict[str, Any]) -> web.Response:
        words = min(plan["words"], told.body["max_tokens"])
        content = [{"type": "text", "text": WORD * words}] if words else []
        reason = "max_tokens" if words == told.body["max_tokens"] else "end_turn"
        return web.json_response({**_MESSAGE, "content": content, "stop_reason": reason, "usage": _usage(words)})

    async def _write(
        self, request: web.Request, response: web.StreamResponse, told: Told, plan: dict[str, Any]
    ) -> None:
        limit = told.body["max_tokens"]
        words, index = min(plan["words"], limit), 0
        await response.prepare(request)
        await _say(response, "message_start", message={**_MESSAGE, "usage": _usage(1)})
        await _say(response, "ping")
        if plan.get("thinks"):
            await _open(response, 0, {"type": "thinking", "thinking": "", "signature": ""})
            await _tell(response, 0, {"type": "thinking_delta", "thinking": "Hmm."})
            await _tell(response, 0, {"type": "signature_delta", "signature": "c2ln"})
            await _say(response, "content_block_stop", index=0)
            index = 1
        await _open(response, index, {"type": "text", "text": ""})
        for number in range(words):
            await self._act(request, response, plan, number)
            if plan.get("end_at") == number:
                return
            await _tell(response, index, {"type": "text_delta", "text": WORD})
            await asyncio.sleep(0)
        await _say(response, "content_block_stop", index=index)
        if plan.get("calls"):
            await _open(response, index + 1, {"type": "tool_use", "id": "toolu_1", "name": "go", "input": {}})
            for part in ('{"city": "Par', 'is"}'):
                await _tell(response, index + 1, {"type": "input_json_delta", "partial_json": part})
            await _say(response, "content_block_stop", index=index + 1)
        reason = "tool_use" if plan.get("calls") else "max_tokens" if words == limit else "end_turn"
        delta = {"stop_reason": reason, "stop_sequence": None}
        await _say(response, "message_delta", delta=delta, usage={"output_tokens": words})
        await _say(response, "message_stop")

    async def _act(self, request: web.Request, response: web.StreamResponse, plan: dict[str, Any], number: int) -> None:
        if plan.get("pause_at") == number:
            await self._gates[plan["name"]].wait()
        if plan.get("stop_at") == number:
            await asyncio.Event().wait()
        if plan.get("error_at") == number:
            await _say(response, "error", error={"type": "overloaded_error", "message": "Overloaded"})
        if plan.get("fail_at") == number:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError


_MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "stand-in",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


def _usage(output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": FRESH_TOKENS,
        "cache_creation_input_tokens": WRITTEN_TOKENS,
        "cache_read_input_tokens": READ_TOKENS,
        "output_tokens": output_tokens,
    }


async def _say(response: web.StreamResponse, kind: str, **members: Any) -> None:
    await response.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **members})}\n\n".encode())


async def _open(response: web.StreamResponse, index: int, block: dict[str, Any]) -> None:
    await _say(response, "content_block_start", index=index, content_block=block)


async def _tell(response: web.StreamResponse, index: int, delta: dict[str, Any]) -> None:
    await _say(response, "content_block_delta", index=index, delta=delta)


# --- the bench -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    gateway: Gateway
    name: str
    key: str

    @asynccontextmanager
    async def sdk(self, max_retries: int = 2) -> AsyncIterator[anthropic.AsyncAnthropic]:
        async with sdk_of(self.gateway, self.key, max_retries) as client:
            yield client

    async def wait_for(self, held: Decimal) -> None:
        """Return once this much of the balance is held. Raises TimeoutError."""
        async with asyncio.timeout(SECONDS):
            while funds_of(self.gateway, self.name).balance_held != held:
                await asyncio.sleep(0.02)

    async def idle_balance(self) -> Decimal:
        """The balance once nothing is held."""
        await self.wait_for(Decimal(0))
        return funds_of(self.gateway, self.name).balance


@asynccontextmanager
async def sdk_of(gateway: Gateway, key: str, max_retries: int = 2) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The real SDK, which adds /v1 to its base URL itself."""
    base_url = gateway.base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key=key, max_retries=max_retries) as client:
        yield client


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Writer
    session: aiohttp.ClientSession
    clock: MovableClock
    numbers: Any = field(default_factory=count)

    def account(self, grant: Decimal | None = PLENTY, plan: str = "prepaid") -> Account:
        name = f"a{next(self.numbers)}"
        return Account(self.gateway, name, new_account(self.gateway, name, plan, grant=grant))

    async def send(self, account: Account, body: bytes, method: str = "POST", path: str = "/messages") -> Answer:
        """Without the SDK, which does not let everything through."""
        async with self.session.request(
            method, self.gateway.base_url + path, data=body, headers={"x-api-key": account.key}
        ) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async def requests_logged(self) -> int:
        """How many requests the gateway has answered. A line is written in the turn after its request's end."""
        async with self.session.get(self.gateway.admin_url + "/livez") as answer:
            assert answer.status == 200
        return sum('"message":"request"' in line for line in self.gateway.stderr.splitlines())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory, module_clock: MovableClock) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("messages") / "data"
    async with Writer() as upstream, aiohttp.ClientSession() as session:
        with running_gateway(_config(upstream.base_url), data_dir=data_dir, clock=module_clock) as gateway:
            yield Bench(gateway, upstream, session, module_clock)


def _config(base_url: str) -> dict[str, Any]:
    plans = {
        "prepaid": {"default": True},
        "daily": {"allowance": {"per_window": str(DAILY), "refresh": "24h"}},
    }
    config = gateway_config(base_url, [*WRITERS, CACHED], plans=plans)
    config["models"]["models"][CACHED]["cache_write_token_price"] = str(CACHE_WRITE_PRICE)
    config["limits"] = {"body": BODY_BYTES}
    return config


_writer = ""
_unused_writers = iter(WRITERS)


@pytest.fixture(autouse=True)
def own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's requests are for unless they say another."""
    monkeypatch.setattr("tests.acceptance.test_messages._writer", next(_unused_writers))


def asking(words: int = 20, *, max_tokens: int = MAX_TOKENS, fields: dict[str, Any] | None = None, **plan: Any) -> Any:
    """The arguments of a call of the SDK. plan: what the upstream is to do besides."""
    return {
        "model": _writer,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "Hello!"}],
        "metadata": {"user_id": json.dumps({"words": words, **plan})},
        **(fields or {}),
    }


def input_bound(request: dict[str, Any], *, stream: bool = True) -> int:
    """The most input tokens: a byte of what is forwarded but for its limits is a token at most; and the template."""
    body = {name: value for name, value in request.items() if name not in ("max_tokens", "thinking")}
    return (
        len(json.dumps(body | ({"stream": True} if stream else {}), separators=(",", ":")).encode()) + TEMPLATE_TOKENS
    )


def hold_of(request: dict[str, Any], tokens: int, *, stream: bool = True) -> Decimal:
    return cost_of(input_bound(request, stream=stream), tokens)


def charge_of(output_tokens: int) -> Decimal:
    """What an answer of the upstream costs where writing to the cache costs as much as other input."""
    return cost_of(INPUT_TOKENS, output_tokens, READ_TOKENS)


@asynccontextmanager
async def held_by_another(bench: Bench, account: Account, name: str) -> AsyncIterator[None]:
    """Another stream of the account, which holds what it first held to the block's end."""
    async with account.sdk() as client, client.messages.stream(**another(name)) as stream:
        await account.wait_for(hold_of(another(name), SLICE))
        yield
        bench.upstream.go(name)
        assert (await stream.get_final_message()).stop_reason == "end_turn"


def another(name: str) -> Any:
    return asking(20, name=name, pause_at=10)


def error_of(failed: anthropic.APIStatusError) -> dict[str, Any]:
    assert isinstance(failed.body, dict)
    assert failed.body["type"] == "error"
    error: dict[str, Any] = failed.body["error"]
    return error


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_an_answer_is_charged_by_every_kind_of_its_input(bench: Bench) -> None:
    account = bench.account()
    exact = (
        FRESH_TOKENS * Decimal("0.0305")
        + READ_TOKENS * Decimal("0.01")
        + WRITTEN_TOKENS * CACHE_WRITE_PRICE
        + 20 * Decimal("0.7777")
    )
    cost = (exact / 1_000_000).quantize(Decimal("0.000000001"), ROUND_CEILING)
    block = {"type": "text", "text": "Hello!", "cache_control": {"type": "ephemeral"}}
    fields = {"model": CACHED, "system": [block], "messages": [{"role": "user", "content": [block]}]}
    async with account.sdk() as client:
        raw = await client.messages.with_raw_response.create(**asking(fields=fields))
        message = await raw.parse()
    assert message.content[0].text == WORD * 20
    assert message.usage.to_dict() == _usage(20)
    assert Decimal(raw.headers["x-credits-cost"]) == cost
    assert await account.idle_balance() == PLENTY - cost

    async with account.sdk() as client, client.messages.stream(**asking(fields=fields)) as stream:
        assert await stream.get_final_text() == WORD * 20
    assert await account.idle_balance() == PLENTY - 2 * cost


async def test_the_upstream_is_told_what_the_client_said_but_not_its_key(bench: Bench) -> None:
    account = bench.account()
    async with account.sdk() as client:
        message = await client.beta.messages.create(
            **asking(),
            # A context window that is wider than what is held for is not opened.
            betas=["interleaved-thinking-2025-05-14", "context-1m-2025-08-07"],
            extra_query={"beta": "true"},
        )
        version = client.default_headers["anthropic-version"]
    assert message.stop_reason == "end_turn"
    told = bench.upstream.told[-1]
    assert told.query == "beta=true"
    assert told.headers["anthropic-beta"] == "interleaved-thinking-2025-05-14"
    assert told.headers["anthropic-version"] == version
    assert account.key not in str(told.headers)
    body = json.dumps(asking()).encode()
    assert (await bench.send(account, body, path="/messages?debug=1&beta=true&beta2=x")).status == 200
    assert bench.upstream.told[-1].query == "beta=true"
    assert (await bench.send(account, body, path="/messages?debug=1")).status == 200
    assert bench.upstream.told[-1].query == ""


async def test_a_streams_cost_is_in_its_last_usage(bench: Bench) -> None:
    account = bench.account()
    async with account.sdk() as client:
        stream = await client.messages.create(**asking(), stream=True)
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * 20,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    final = events[-2]
    assert final.type == "message_delta"
    assert (final.delta.stop_reason, final.usage.output_tokens) == ("end_turn", 20)
    said = final.usage.to_dict()
    assert Decimal(str(said["credits"]["cost"])) == charge_of(20)  # type: ignore[index]
    assert said["cost"] == float(charge_of(20))
    assert said["credits"]["source"] == "payg"  # type: ignore[index]
    assert await account.idle_balance() == PLENTY - charge_of(20)


async def test_thinking_and_calls_are_passed_on(bench: Bench) -> None:
    account = bench.account()
    request = asking(
        fields={
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [{"name": "go", "input_schema": {"type": "object"}}],
        },
        thinks=True,
        calls=True,
    )
    async with account.sdk() as client, client.messages.stream(**request) as stream:
        message = await stream.get_final_message()
    thinking, text, call = message.content
    assert thinking.type == "thinking" and (thinking.thinking, thinking.signature) == ("Hmm.", "c2ln")
    assert text.type == "text" and text.text == WORD * 20
    assert call.type == "tool_use" and (call.name, call.input) == ("go", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    assert bench.upstream.told[-1].body["thinking"] == request["thinking"]
    assert await account.idle_balance() == PLENTY - charge_of(20)


async def test_what_cannot_be_paid_is_asked_for_less_of(bench: Bench) -> None:
    request = asking(MAX_TOKENS, fields={"thinking": {"type": "enabled", "budget_tokens": 1800}})
    account = bench.account(hold_of(request, 1500, stream=False))
    async with account.sdk() as client:
        raw = await client.messages.with_raw_response.create(**request)
    assert raw.headers["x-credits-max-tokens"] == "1500"
    told = bench.upstream.told[-1].body
    assert told["max_tokens"] == 1500
    assert told["thinking"] == {"type": "enabled", "budget_tokens": 1350}


async def test_a_stream_whose_credits_end_ends_well(bench: Bench) -> None:
    request = asking(MAX_TOKENS, name="cut", stop_at=950)
    account = bench.account(hold_of(another("cut-other"), SLICE) + hold_of(request, 900))
    grant = await account_balance(account)
    async with held_by_another(bench, account, "cut-other"):
        async with account.sdk() as client, client.messages.stream(**request) as stream:
            events = [event async for event in stream]
            message = await stream.get_final_message()
        told = next(told for told in bench.upstream.told if '"cut"' in told.body["metadata"]["user_id"])
        async with asyncio.timeout(SECONDS):
            await told.over.wait()
        assert told.left
    assert message.stop_reason == "max_tokens"
    assert message.content[0].type == "text" and message.content[0].text == WORD * 900
    assert [event.type for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    final = events[-2].to_dict()
    quota: Any = final["quota"]
    assert (quota["ended_by"], quota["code"]) == ("credits", "insufficient_quota")
    usage: Any = final["usage"]
    assert {name: usage[name] for name in _usage(0)} == _usage(900)
    assert Decimal(usage["credits"]["cost"]) == charge_of(900)
    assert await account.idle_balance() == grant - charge_of(900) - charge_of(20)


async def account_balance(account: Account) -> Decimal:
    return funds_of(account.gateway, account.name).balance


async def test_who_leaves_pays_for_what_was_sent(bench: Bench) -> None:
    account = bench.account()
    async with account.sdk() as client:
        stream = await client.messages.create(**asking(name="left", stop_at=50), stream=True)
        async for event in stream:
            if event.type == "content_block_delta":
                break
        await stream.close()
    balance = await account.idle_balance()
    assert PLENTY - charge_of(50) <= balance <= PLENTY - charge_of(1)


# --- streams that break ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["fail_at", "end_at"])
async def test_a_broken_stream_raises_and_costs_nothing(bench: Bench, ending: str) -> None:
    account = bench.account()
    before = len(bench.upstream.told)
    async with account.sdk() as client, client.messages.stream(**asking(**{ending: 10})) as stream:
        with pytest.raises(anthropic.APIStatusError) as failed:
            await stream.get_final_message()
    error = error_of(failed.value)
    assert (error["type"], error["code"]) == ("api_error", "upstream_unavailable")
    assert failed.value.body["request_id"] == failed.value.request_id  # type: ignore[index]
    assert await account.idle_balance() == PLENTY
    assert len(bench.upstream.told) == before + 1


async def test_an_upstreams_error_in_a_stream_is_shown_as_it_came(bench: Bench) -> None:
    account = bench.account()
    async with account.sdk() as client, client.messages.stream(**asking(error_at=10)) as stream:
        with pytest.raises(anthropic.APIStatusError) as failed:
            await stream.get_final_message()
    assert error_of(failed.value) == {"type": "overloaded_error", "message": "Overloaded"}
    assert await account.idle_balance() == PLENTY


# --- errors ----------------------------------------------------------------------------------------------------------


async def failure_of(
    bench: Bench, key: str, request: Any, kind: type[anthropic.APIStatusError], *, stream: bool, requests: int = 1
) -> dict[str, Any]:
    """The error that the SDK, allowed two repeats, raises after this many requests."""
    before = await bench.requests_logged()
    async with sdk_of(bench.gateway, key) as client:
        with pytest.raises(kind) as failed:
            await client.messages.create(**request, stream=stream)
    assert type(failed.value) is kind
    assert failed.value.request_id is not None
    assert await bench.requests_logged() - before == requests
    error = error_of(failed.value)
    assert isinstance(error["message"], str) and isinstance(error["metadata"], dict)
    return error


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_errors_are_what_the_sdk_takes_them_for_and_are_not_repeated(bench: Bench, stream: bool) -> None:
    account, poor = bench.account(), bench.account(None)
    before = len(bench.upstream.told)
    server_tool = {"type": "web_search_20250305", "name": "web_search"}
    for key, request, kind, expected in (
        ("sk-nobody", asking(), anthropic.AuthenticationError, ("authentication_error", "invalid_api_key", None)),
        (poor.key, asking(), anthropic.PaymentRequiredError, ("billing_error", "insufficient_quota", None)),
        (
            account.key,
            asking(fields={"model": "claude-nobody"}),
            anthropic.NotFoundError,
            ("not_found_error", "model_not_found", "model"),
        ),
        (
            account.key,
            asking(max_tokens=0),
            anthropic.BadRequestError,
            ("invalid_request_error", "invalid_body", "max_tokens"),
        ),
        (
            account.key,
            asking(fields={"tools": [server_tool]}),
            anthropic.BadRequestError,
            ("invalid_request_error", "invalid_body", "tools[0].type"),
        ),
        (
            account.key,
            asking(fields={"system": "x" * BODY_BYTES}),
            anthropic.ContentTooLargeError,
            ("request_too_large", "request_too_large", None),
        ),
    ):
        error = await failure_of(bench, key, request, kind, stream=stream)
        assert (error["type"], error["code"], error["param"]) == expected
    assert len(bench.upstream.told) == before
    assert await account.idle_balance() == PLENTY


async def test_a_request_without_a_limit_is_told_which_field_it_needs(bench: Bench) -> None:
    request = asking()
    del request["max_tokens"]
    answer = await bench.send(bench.account(), json.dumps(request).encode())
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert (answer.error["code"], answer.error["param"]) == ("invalid_body", "max_tokens")


async def test_a_wrong_method_is_told_in_the_same_words(bench: Bench) -> None:
    answer = await bench.send(bench.account(), b"", "GET")
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        405,
        "invalid_request_error",
        "method_not_allowed",
    )
    assert answer.headers["Allow"] == "POST"


async def test_other_endpoints_keep_their_words(bench: Bench) -> None:
    nobody = Account(bench.gateway, "nobody", "sk-nobody")
    answer = await bench.send(nobody, b"{}", path="/chat/completions")
    assert (answer.status, answer.error["type"]) == (401, "invalid_request_error")


async def test_a_spent_allowance_is_not_asked_again(bench: Bench) -> None:
    account = bench.account(None, "daily")
    request = asking(DAILY_WORDS, max_tokens=DAILY_WORDS)
    bench.clock.freeze_at(at(NOON + timedelta(hours=1)))
    try:
        async with account.sdk() as client:
            await client.messages.create(**request)
        error = await failure_of(bench, account.key, request, anthropic.RateLimitError, stream=False)
    finally:
        bench.clock.set_to(NOON + timedelta(hours=1))
    assert (error["type"], error["code"]) == ("rate_limit_error", "insufficient_quota")
    assert "2026-11-24T00:00:00Z" in error["message"]
    assert isinstance(error["resets_at"], int)


async def test_credits_held_by_another_request_are_worth_another_try(bench: Bench) -> None:
    account = bench.account(hold_of(another("busy-other"), SLICE) + Decimal("0.00001"))
    async with held_by_another(bench, account, "busy-other"), account.sdk(max_retries=0) as client:
        with pytest.raises(anthropic.RateLimitError) as failed:
            await client.messages.create(**asking())
    error = error_of(failed.value)
    assert (error["type"], error["code"]) == ("rate_limit_error", "credits_in_flight")
    assert failed.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("status", "kind", "error_class", "expected"),
    [
        (400, "invalid_request_error", anthropic.BadRequestError, "invalid_request_error"),
        (401, "authentication_error", anthropic.InternalServerError, "api_error"),
        (429, "rate_limit_error", anthropic.RateLimitError, "rate_limit_error"),
        (529, "overloaded_error", anthropic.OverloadedError, "overloaded_error"),
    ],
)
async def test_an_upstreams_error_keeps_its_status(
    bench: Bench, status: int, kind: str, error_class: type[anthropic.APIStatusError], expected: str
) -> None:
    account = bench.account()
    async with account.sdk(max_retries=0) as client:
        with pytest.raises(error_class) as failed:
            await client.messages.create(**asking(status=status, type=kind))
    assert type(failed.value) is error_class
    assert error_of(failed.value)["type"] == expected
    assert await account.idle_balance() == PLENTY


async def test_nothing_of_this_was_a_mistake_of_the_gateway(bench: Bench) -> None:
    lines = [json.loads(line) for line in bench.gateway.stderr.splitlines()]
    assert [line for line in lines if "exception" in line and line["logger"].startswith("gateway")] == []


# --- a real server ---------------------------------------------------------------------------------------------------


async def test_a_real_server_is_charged_by_its_usage(llama: str, tmp_path: Path) -> None:
    config = gateway_config(llama, [MODEL_NAME], plans={"prepaid": {"default": True}})
    request: Any = {
        "model": MODEL_NAME,
        "max_tokens": 300,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hello!"}],
    }
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        account = Account(gateway, "real", new_account(gateway, "real", "prepaid", grant=PLENTY))
        async with account.sdk() as client:
            whole = await client.messages.create(**request)
            async with client.messages.stream(**request) as stream:
                events = [event async for event in stream]
                streamed = await stream.get_final_message()
            with pytest.raises(anthropic.BadRequestError) as failed:
                await client.messages.create(**request | {"system": "x " * 5000})
        spent = Decimal(0)
        for message in (whole, streamed):
            used = message.usage
            assert (message.stop_reason, used.output_tokens) == ("max_tokens", 300)
            read = used.cache_read_input_tokens or 0
            spent += cost_of(used.input_tokens + read, 300, read)
        assert (streamed.usage.cache_read_input_tokens or 0) > 0
        said: Any = next(event for event in events if event.type == "message_delta").usage.to_dict()
        assert PLENTY - Decimal(said["credits"]["balance"]) == spent
        assert error_of(failed.value)["type"] == "invalid_request_error"
        assert await account.idle_balance() == PLENTY - spent
