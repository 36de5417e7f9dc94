"""Faults of upstreams and clients, through the real gateway process: what the client sees, what it pays, what is left.

Wherever a request was let through, the account's balance shows the charge once nothing is held any more, and then the
gateway must still answer.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.acceptance.conftest import TEMPLATE_TOKENS, Answer, ask, funds_of, hold_of, input_bound
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.upstreams.faulty import (
    BEHAVIOURS,
    COMPLETION_TOKENS,
    PIECES,
    PROMPT_TOKENS,
    SLOW_CHUNKS,
    TEXT,
    Exchange,
    FaultyUpstream,
    Record,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPSTREAM_KEY = "sk-of-the-upstream-0123456789"
MAX_TOKENS = 100
RESPONSE_BYTES = 2**20
#: What a request for the upstream's usual answer costs.
USUAL = cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)
#: Models that are not behaviours: of upstreams that may not be silent or answer for long, and of one that is not there.
#: Nobody listens where the upstream "refused" should be: on port 1, which no other process gets meanwhile.
HASTY, BRIEF, REFUSED = "hasty", "brief", "refused"
#: Bytes of text for a token where the upstream reports no usage.
BYTES_PER_TOKEN = 4
#: The event that a client which did not ask for usage does not get to see.
USAGE_ONLY = re.compile(rb'data: [^\n]*"choices": \[\], "usage"[^\n]*\n\n')


# --- behaviours that only these tests need ---------------------------------------------------------------------------


async def _status_403(exchange: Exchange) -> None:
    await exchange.error(403, f"This key may not: {exchange.record.header('authorization')}")


async def _status_302(exchange: Exchange) -> None:
    await exchange.respond(302, b"{}", "Location: /v1/elsewhere")


async def _status_402(exchange: Exchange) -> None:
    await exchange.error(402, "the operator's account is empty")


async def _far_retry(exchange: Exchange) -> None:
    await exchange.error(429, "this upstream is busy for long", "Retry-After: 86400")


async def _dated_retry(exchange: Exchange) -> None:
    await exchange.error(503, "this upstream is busy", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT")


async def _error_without_message(exchange: Exchange) -> None:
    await exchange.respond(500, b'{"error": {"code": 5}}')


async def _flat_error(exchange: Exchange) -> None:
    """What older vLLM versions send in the middle of a stream; the SDKs take no notice of it."""
    await exchange.start_stream()
    for piece in PIECES[:3]:
        await exchange.events({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    await exchange.events({"object": "error", "message": "this upstream broke midway", "code": 500})
    await exchange.end(done=False)


async def _no_blank_line(exchange: Exchange) -> None:
    """The stream's last event ends with the body, not with a blank line."""
    await exchange.start_stream()
    for piece in PIECES:
        await exchange.events({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    await exchange.events({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
    await exchange.part(b"data: [DONE]\n")
    await exchange.write(b"0\r\n\r\n")


async def _endless(exchange: Exchange) -> None:
    """Far more than was asked for; the first event comes alone."""
    await exchange.start_stream()
    while True:
        await exchange.events({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
        await asyncio.sleep(0.1 if exchange.record.events_sent == 1 else 0)


async def _reasoning_twice(exchange: Exchange) -> None:
    """vLLM repeats reasoning under its old name."""
    await exchange.start_stream()
    for piece in PIECES[:3]:
        delta = {"reasoning": piece, "reasoning_content": piece}
        await exchange.events({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    await exchange.hang()


MORE_BEHAVIOURS = {
    "status-403": _status_403,
    "status-302": _status_302,
    "status-402": _status_402,
    "far-retry": _far_retry,
    "dated-retry": _dated_retry,
    "no-blank-line": _no_blank_line,
    "endless": _endless,
    "error-without-message": _error_without_message,
    "flat-error-in-stream": _flat_error,
    "reasoning-twice": _reasoning_twice,
}


# --- the bench -------------------------------------------------------------------------------------------------------


@dataclass
class Charge:
    """What a block cost, in credits; to be read after it."""

    credits: Decimal = Decimal(-1)


@dataclass(frozen=True)
class Bench:
    """A gateway before a hostile upstream, and a client. The account has a balance and no allowance."""

    gateway: Gateway
    upstream: FaultyUpstream
    session: aiohttp.ClientSession

    async def ask(self, model: str, *, stream: bool = False, **fields: Any) -> Answer:
        return await self.send(body_of(model, stream=stream, **fields))

    async def send(self, body: bytes, path: str = "/chat/completions") -> Answer:
        assert self.gateway.key is not None
        async with asyncio.timeout(30):
            return await ask(self.session, self.gateway, self.gateway.key, body, path)

    async def direct(self, model: str, **fields: Any) -> bytes:
        """What the upstream says when it is asked without a gateway."""
        url = f"{self.upstream.base_url}/chat/completions"
        async with self.session.post(url, data=body_of(model, stream=True, **fields)) as response:
            return await response.read()

    @asynccontextmanager
    async def charging(self) -> AsyncIterator[Charge]:
        """What the block costs. Raises TimeoutError if it leaves anything held."""
        before, charge = await self._balance(), Charge()
        yield charge
        async with asyncio.timeout(20):
            while (after := self._idle_balance()) is None:
                await asyncio.sleep(0.05)
        charge.credits = before - after
        assert await self._balance() == after - USUAL

    async def _balance(self) -> Decimal:
        """The balance after one more request, which must be answered."""
        answer = await self.ask("ok")
        assert answer.status == 200
        return Decimal(answer.headers["x-credits-balance"])

    def _idle_balance(self) -> Decimal | None:
        """The balance, once nothing is held."""
        funds = funds_of(self.gateway)
        idle = not funds.held and not funds.balance_held and self.gateway.cli("reservations", "list")["data"] == []
        return funds.balance if idle else None

    @asynccontextmanager
    async def behaving(self, behaviour: str) -> AsyncIterator[None]:
        """The upstream behaves so whatever the model."""
        self.upstream.behaviour = behaviour
        try:
            yield
        finally:
            self.upstream.behaviour = None


def body_of(model: str, *, stream: bool = False, **fields: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": MAX_TOKENS, **fields}
    return json.dumps({**body, "stream": True} if stream else body).encode()


def estimated(body: bytes) -> int:
    """Input tokens that are charged where the upstream reports none."""
    return -(-(input_bound(body) - TEMPLATE_TOKENS) // BYTES_PER_TOKEN)


def counted(*texts: str) -> int:
    """Output tokens that are charged for events with these texts where the upstream reports none."""
    return max(len(texts), -(-len("".join(texts).encode()) // BYTES_PER_TOKEN))


def events_of(stream: bytes) -> list[bytes]:
    """The events of a stream whose lines end in LF, as they are."""
    return [event + b"\n\n" for event in stream.split(b"\n\n")[:-1]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("faults") / "data"
    with pytest.MonkeyPatch.context() as patch:
        for name, behaviour in MORE_BEHAVIOURS.items():
            patch.setitem(BEHAVIOURS, name, behaviour)
        async with FaultyUpstream() as upstream, aiohttp.ClientSession() as session:
            with running_gateway(_config(upstream.base_url), data_dir=data_dir) as gateway:
                gateway.cli("credits", "grant", "default", "100")
                yield Bench(gateway, upstream, session)


def _config(base_url: str) -> dict[str, Any]:
    config = gateway_config(base_url, [*BEHAVIOURS, HASTY, BRIEF, REFUSED], plans={"prepaid": {"default": True}})
    config["upstreams"] = {
        "test": {"base_url": base_url, "api_key": UPSTREAM_KEY},
        HASTY: {"base_url": base_url, "api_key": UPSTREAM_KEY, "idle_timeout": "300ms"},
        BRIEF: {"base_url": base_url, "api_key": UPSTREAM_KEY, "total_timeout": "500ms"},
        REFUSED: {"base_url": "http://127.0.0.1:1/v1", "api_key": UPSTREAM_KEY},
    }
    for name in (HASTY, BRIEF, REFUSED):
        config["models"]["models"][name]["upstream"] = name
    config["limits"] = {"response": RESPONSE_BYTES}
    return config


# --- whole answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A behaviour and what comes of it.

    code: of the gateway's own error, None where the upstream's error is passed on. tokens: charged, input and output;
    an input of None is estimated from the request. headers: how clients are told whether to try again.
    """

    behaviour: str
    status: int = 200
    code: str | None = None
    tokens: tuple[int | None, int] = (0, 0)
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False
    model: str | None = None

    def __str__(self) -> str:
        words = (self.model, self.behaviour, "streamed" if self.stream else None)
        return " ".join(word for word in words if word)


AGAIN = {"Retry-After": "1"}
NEVER = {"x-should-retry": "false"}
RETRY_HEADERS = ("Retry-After", "retry-after-ms", "x-should-retry")
TEXT_TOKENS = counted(TEXT)

ANSWERED = [
    Case("ok", tokens=(7, 5)),
    Case("gzip-body", tokens=(7, 5)),
    Case("ok", tokens=(7, 5), stream=True),
    Case("empty-choices"),
    Case("empty-content"),
    Case("no-usage", tokens=(None, TEXT_TOKENS)),
    Case("negative-usage", tokens=(None, TEXT_TOKENS)),
    Case("usage-bool-or-string", tokens=(None, TEXT_TOKENS)),
    Case("many-choices", tokens=(7, MAX_TOKENS)),
]

FAILED = [
    Case("status-400", 400),
    Case("status-401", 502, "upstream_auth", headers=NEVER),
    Case("status-402", 502, "upstream_auth", headers=NEVER),
    Case("status-403", 502, "upstream_auth", headers=NEVER),
    Case("status-429", 429, headers={"Retry-After": "7"}),
    Case("far-retry", 429, headers={"Retry-After": "60"}),
    Case("dated-retry", 503),
    Case("status-500", 500),
    Case("status-500", 500, stream=True),
    Case("error-without-message", 500),
    Case("status-302", 502, "upstream_unavailable", headers=AGAIN),
    Case("reset-before-headers", 502, "upstream_unavailable", headers=AGAIN),
    Case("reset-before-headers", 502, "upstream_unavailable", headers=AGAIN, stream=True),
    Case("ok", 502, "upstream_unavailable", headers=AGAIN, model=REFUSED),
    Case("hang-before-headers", 504, "upstream_timeout", headers=NEVER, model=HASTY),
    Case("hang-before-headers", 504, "upstream_timeout", headers=NEVER, model=HASTY, stream=True),
    Case("hang-mid-stream", 504, "upstream_timeout", headers=NEVER, model=HASTY),
    Case("garbage-body", 502, "upstream_unavailable", headers=AGAIN),
    Case("garbage-body", 502, "upstream_unavailable", headers=AGAIN, stream=True),
    Case("empty-body", 502, "upstream_unavailable", headers=AGAIN),
    Case("huge-body", 502, "upstream_unavailable", headers=AGAIN),
    Case("ok-stream", 502, "upstream_unavailable", headers=AGAIN),
    Case("cut-stream", 502, "upstream_unavailable", headers=AGAIN),
]


async def run(bench: Bench, case: Case) -> Answer:
    """The case's answer; it must have cost what the case says."""
    model = case.model or case.behaviour
    body = body_of(model, stream=case.stream)
    async with bench.charging() as charge, bench.behaving(case.behaviour):
        answer = await bench.send(body)
    given, made = case.tokens
    assert charge.credits == cost_of(estimated(body) if given is None else given, made)
    assert {name: answer.headers[name] for name in RETRY_HEADERS if name in answer.headers} == case.headers
    assert answer.status == case.status
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert answer.headers["Content-Type"] == "application/json"
    if answer.status == 200:
        assert answer.cost == charge.credits
        assert answer.source == "payg"
        assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(body, MAX_TOKENS)
    return answer


@pytest.mark.parametrize("case", ANSWERED, ids=str)
async def test_an_odd_answer_is_passed_on_and_charged(bench: Bench, case: Case) -> None:
    answer = await run(bench, case)
    assert isinstance(answer.document["choices"], list)
    assert all(choice["message"]["content"] in ("", TEXT) for choice in answer.document["choices"])


@pytest.mark.parametrize("case", FAILED, ids=str)
async def test_a_failed_answer_is_an_error_that_costs_nothing(bench: Bench, case: Case) -> None:
    answer = await run(bench, case)
    assert isinstance(answer.error["message"], str)
    if case.code is not None:
        assert answer.document["type"] == "error"
        assert answer.document["request_id"] == answer.headers["x-request-id"]
        assert (answer.error["type"], answer.error["code"]) == ("api_error", case.code)
    for secret in (UPSTREAM_KEY, str(bench.gateway.key)):
        assert secret.encode() not in answer.body
        assert secret not in bench.gateway.stderr


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    seen = len(bench.upstream.requests)
    await bench.ask("status-302")
    assert [record.path for record in bench.upstream.requests[seen:]] == ["/v1/chat/completions"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_absurd_usage_costs_what_was_held_and_no_more(bench: Bench, stream: bool) -> None:
    async with bench.charging() as charge:
        answer = await bench.ask("absurd-usage-stream" if stream else "absurd-usage", stream=stream)
    assert answer.status == 200
    assert charge.credits == Decimal(answer.headers["x-credits-reserved"]) > 0


async def test_embeddings_are_charged_by_their_input(bench: Bench) -> None:
    async with bench.charging() as charge:
        answer = await bench.send(json.dumps({"model": "ok", "input": ["a", "b"]}).encode(), "/embeddings")
    assert answer.document["data"][0]["embedding"] == [0.6, 0.8]
    assert charge.credits == answer.cost == cost_of(PROMPT_TOKENS, 0)


# --- streams ---------------------------------------------------------------------------------------------------------

STREAMED = [
    Case("ok-stream", tokens=(7, 5)),
    Case("crlf-stream", tokens=(7, 5)),
    Case("split-events", tokens=(7, 5)),
    Case("two-events-in-one-write", tokens=(7, 5)),
    Case("big-event", tokens=(7, 5)),
    Case("comments", tokens=(7, 5)),
    Case("usage-null-every-chunk", tokens=(7, 5)),
    Case("usage-on-finish-chunk", tokens=(7, 5)),
    Case("usage-cumulative-every-chunk", tokens=(7, 5)),
    Case("no-usage-stream", tokens=(None, TEXT_TOKENS)),
    Case("negative-usage-stream", tokens=(None, TEXT_TOKENS)),
    Case("usage-bool-or-string-stream", tokens=(None, TEXT_TOKENS)),
    Case("no-blank-line", tokens=(7, 5)),
    Case("empty-stream"),
    Case("garbage-stream", tokens=(None, 6)),  # what nobody can read was handed out all the same
]


@pytest.mark.parametrize("case", STREAMED, ids=str)
async def test_a_stream_passes_byte_for_byte_and_is_charged(bench: Bench, case: Case) -> None:
    body = body_of(case.behaviour, stream=True)
    line_end = b"\r\n" if case.behaviour == "crlf-stream" else b"\n"
    async with bench.charging() as charge:
        answer = await bench.send(body)
    # The gateway asks for usage where the client did not.
    direct = await bench.direct(case.behaviour, stream_options={"include_usage": True})
    shown = USAGE_ONLY.sub(b"", direct.replace(b"\r\n", b"\n")).replace(b', "usage": null', b"")
    assert answer.body == shown.replace(b"\n", line_end)
    given, made = case.tokens
    assert charge.credits == cost_of(estimated(body) if given is None else given, made)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(body, MAX_TOKENS)
    assert "x-credits-cost" not in answer.headers


@pytest.mark.parametrize(
    "behaviour", ["ok-stream", "crlf-stream", "split-events", "big-event", "comments", "usage-on-finish-chunk"]
)
async def test_who_asks_for_usage_gets_the_cost_in_it(bench: Bench, behaviour: str) -> None:
    options = {"stream_options": {"include_usage": True}}
    async with bench.charging() as charge:
        answer = await bench.ask(behaviour, stream=True, **options)
    direct = await bench.direct(behaviour, **options)
    # All before the last event with a usage, and the end, are as the upstream sent them.
    assert direct.startswith(answer.body[: answer.body.rindex(b"data: {")])
    assert direct.endswith(answer.body[answer.body.rindex(b"data: [DONE]") :])
    text = answer.body[answer.body.rindex(b"data: {") :].split(b"data: [DONE]")[0].removeprefix(b"data: ")
    written = json.loads(text, parse_float=Decimal)
    credits = written["usage"].pop("credits")
    assert written["usage"].pop("cost") == Decimal(credits["cost"]) == charge.credits == USUAL
    assert credits["source"] == "payg"
    assert written == json.loads(direct[direct.rindex(b"data: {") :].split(b"data: [DONE]")[0].removeprefix(b"data: "))


async def test_two_answers_with_a_usage_each_are_charged_together(bench: Bench) -> None:
    async with bench.charging() as charge:
        answer = await bench.ask("two-usage-chunks", stream=True, n=2)
    assert len([event for event in answer.events if event["choices"]]) == 2 * len(PIECES) + 2
    assert all(event["choices"] for event in answer.events)
    assert charge.credits == cost_of(PROMPT_TOKENS, 2 * COMPLETION_TOKENS)


BROKEN = [
    Case("cut-stream", code="upstream_unavailable"),
    Case("clean-eof-no-done", code="upstream_unavailable"),
    Case("hang-mid-stream", code="upstream_timeout", model=HASTY),
    Case("error-event-in-stream"),
    Case("flat-error-in-stream"),
]


@pytest.mark.parametrize("case", BROKEN, ids=str)
async def test_a_broken_stream_ends_in_an_error_and_costs_nothing(bench: Bench, case: Case) -> None:
    async with bench.charging() as charge, bench.behaving(case.behaviour):
        answer = await bench.ask(case.model or case.behaviour, stream=True)
    assert charge.credits == 0
    assert answer.status == 200
    data = [json.loads(event.removeprefix(b"data: ")) for event in events_of(answer.body)]
    assert [event["choices"][0]["delta"]["content"] for event in data[:3]] == list(PIECES[:3])
    assert isinstance(data[-1]["error"]["message"], str)
    if case.code is not None:
        assert len(data) == 4
        assert (data[3]["type"], data[3]["error"]["type"], data[3]["error"]["code"]) == (
            "error",
            "api_error",
            case.code,
        )
        assert data[3]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("case", BROKEN, ids=str)
async def test_the_sdk_does_not_take_a_broken_stream_for_success(bench: Bench, case: Case) -> None:
    async with (
        openai.AsyncOpenAI(base_url=bench.gateway.base_url, api_key=bench.gateway.key, max_retries=0) as client,
        bench.behaving(case.behaviour),
    ):
        stream = await client.chat.completions.create(
            model=case.model or case.behaviour, messages=[{"role": "user", "content": "Hello!"}], stream=True
        )
        seen = []
        with pytest.raises(openai.APIError):
            async for chunk in stream:
                seen += [choice.delta.content for choice in chunk.choices or []]
    assert seen[:3] == list(PIECES[:3])


async def test_an_answer_that_takes_too_long_is_cut_and_charged_as_far_as_it_went(bench: Bench) -> None:
    body = body_of(BRIEF, stream=True)
    async with bench.charging() as charge, bench.behaving("slow-stream"):
        seen = len(bench.upstream.requests)
        answer = await bench.send(body)
        await stopped(bench, bench.upstream.requests[seen])
    *events, last = (json.loads(event.removeprefix(b"data: ")) for event in events_of(answer.body))
    assert 0 < len(events) < SLOW_CHUNKS
    assert charge.credits == cost_of(estimated(body), len(events))
    assert last["error"]["code"] == "upstream_timeout"


async def test_an_upstream_that_does_not_stop_is_stopped(bench: Bench) -> None:
    body = body_of("endless", stream=True, max_tokens=1)
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        answer = await bench.send(body)
        await stopped(bench, bench.upstream.requests[seen])
    last = json.loads(events_of(answer.body)[-1].removeprefix(b"data: "))
    assert isinstance(last["error"]["message"], str)
    assert charge.credits == cost_of(estimated(body), 1)


# --- clients that leave ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def raw_request(bench: Bench, body: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of its own on which the request was sent."""
    address = urlsplit(bench.gateway.base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: Bearer {bench.gateway.key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def next_record(bench: Bench, seen: int) -> Record:
    """The upstream's record of the request after those that it had seen."""
    return (await bench.upstream.wait_for_requests(seen + 1))[seen]


async def stopped(bench: Bench, record: Record) -> None:
    """Return once the upstream has noticed that nobody waits for this answer any more."""
    async with asyncio.timeout(20):
        while not record.finished:
            await asyncio.sleep(0.01)
    assert record.disconnected


@pytest.mark.parametrize("behaviour", ["hang-mid-stream", "reasoning-twice"])
async def test_who_leaves_a_stream_pays_for_the_events_so_far(bench: Bench, behaviour: str) -> None:
    body = body_of(behaviour, stream=True)
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        async with raw_request(bench, body) as (reader, _), asyncio.timeout(20):
            for _event in range(3):
                await reader.readuntil(b"data: ")
                await reader.readuntil(b"\n\n")
        await stopped(bench, await next_record(bench, seen))
    assert charge.credits == cost_of(estimated(body), counted(*PIECES[:3]))


async def test_who_leaves_a_stream_that_flows_stops_it(bench: Bench) -> None:
    body = body_of("slow-stream", stream=True)
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        async with raw_request(bench, body) as (reader, _), asyncio.timeout(20):
            for _event in range(4):
                await reader.readuntil(b"data: ")
        record = await next_record(bench, seen)
        await stopped(bench, record)
    assert record.events_sent < SLOW_CHUNKS
    assert charge.credits in [cost_of(estimated(body), events) for events in range(3, record.events_sent + 1)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_who_leaves_before_the_answer_begins_pays_nothing(bench: Bench, stream: bool) -> None:
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        async with raw_request(bench, body_of("hang-before-headers", stream=stream)):
            record = await next_record(bench, seen)
        await stopped(bench, record)
    assert charge.credits == 0


async def test_who_leaves_while_an_unstreamed_answer_arrives_pays_nothing(bench: Bench) -> None:
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        async with raw_request(bench, body_of("hang-mid-stream")), asyncio.timeout(20):
            record = await next_record(bench, seen)
            while record.events_sent < 3:
                await asyncio.sleep(0.01)
        await stopped(bench, record)
    assert charge.credits == 0


async def test_who_leaves_before_the_request_is_whole_holds_nothing(bench: Bench) -> None:
    async with bench.charging() as charge:
        seen = len(bench.upstream.requests)
        address = urlsplit(bench.gateway.base_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bench.gateway.key}\r\n"
        writer.write(head.encode() + b'Content-Length: 1000\r\n\r\n{"model": "ok", ')
        await writer.drain()
        writer.close()
        assert await reader.read() == b""
        await writer.wait_closed()
    assert charge.credits == 0
    # Only the requests that show that the gateway answers.
    assert [record.model for record in bench.upstream.requests[seen:]] == ["ok"]


# --- what the upstream is told ---------------------------------------------------------------------------------------


async def echoed(bench: Bench, body: bytes, **headers: str) -> Record:
    """The request as the upstream received it."""
    seen = len(bench.upstream.requests)
    async with bench.session.post(f"{bench.gateway.base_url}/chat/completions", data=body, headers=headers) as response:
        assert response.status == 200, await response.text()
    return bench.upstream.requests[seen]


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "token"])
async def test_no_secret_of_the_client_reaches_the_upstream(bench: Bench, name: str) -> None:
    secret = str(bench.gateway.key)
    headers = {
        "x-api-key": "sk-something-else",
        "token": "sk-something-else",
        "Cookie": f"session={secret}",
        "Proxy-Authorization": f"Basic {secret}",
        "api-key": secret,
        "X-Forwarded-For": "192.0.2.1",
        "anthropic-beta": "one",
        "User-Agent": "a-client/1",
    }
    if name == "token":
        del headers["x-api-key"]
    headers[name] = f"Bearer {secret}" if name == "Authorization" else secret
    record = await echoed(bench, body_of("echo"), **headers)
    names = {header for header, _ in record.headers}
    assert not names & {"x-api-key", "token", "cookie", "proxy-authorization", "api-key", "x-forwarded-for"}
    assert [value for header, value in record.headers if header == "authorization"] == [f"Bearer {UPSTREAM_KEY}"]
    assert secret not in str(record.headers) and "something-else" not in str(record.headers)
    assert (record.header("user-agent"), record.header("anthropic-beta")) == ("a-client/1", "one")
    assert (record.method, record.path) == ("POST", "/v1/chat/completions")
    assert secret not in bench.gateway.stderr


async def test_what_is_forwarded_is_what_was_priced(bench: Bench) -> None:
    raw = (
        b'{"model": "ok", "messages": [{"role": "user", "content": "one", "content": "tw\\u006f"}], '
        b'"max_tokens": 2000, "max_\\u0074okens": 7, "n": 100, "n": 1, "model": "echo"}'
    )
    seen = len(bench.upstream.requests)
    answer = await bench.send(raw)
    record = bench.upstream.requests[seen]
    expected = {"model": "echo", "messages": [{"role": "user", "content": "two"}], "max_tokens": 7, "n": 1}
    assert json.loads(record.body, object_pairs_hook=_unrepeated) == expected
    assert Decimal(answer.headers["x-credits-reserved"]) == hold_of(raw, 7)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


@pytest.mark.parametrize(
    ("fields", "forwarded"),
    [
        ({"max_tokens": None}, {"max_tokens": 2048}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 10_000}, {"max_tokens": 2048}),
        ({"max_tokens": None, "max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 7}),
    ],
)
async def test_the_output_is_always_limited(bench: Bench, fields: Any, forwarded: dict[str, Any]) -> None:
    seen = len(bench.upstream.requests)
    answer = await bench.ask("echo", **fields)
    body = bench.upstream.requests[seen].json()
    assert {name: body[name] for name in ("max_tokens", "max_completion_tokens") if name in body} == forwarded
    lowered = fields["max_tokens"] == 10_000
    assert answer.headers.get("x-credits-max-tokens") == ("2048" if lowered else None)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, None),
        ({"stream": False}, None),
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, {"include_usage": True}),
        (
            {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
            {"include_usage": True, "include_obfuscation": False},
        ),
    ],
)
async def test_usage_is_asked_for_only_of_a_stream(bench: Bench, fields: dict[str, Any], options: object) -> None:
    seen = len(bench.upstream.requests)
    await bench.ask("echo", **fields)
    assert bench.upstream.requests[seen].json().get("stream_options") == options


async def test_the_other_prefix_does_the_same(bench: Bench) -> None:
    root = bench.gateway.base_url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {bench.gateway.key}"}
    async with (
        bench.charging() as charge,
        bench.session.post(f"{root}/api/v1/chat/completions", data=body_of("ok"), headers=headers) as response,
    ):
        assert response.status == 200
    assert charge.credits == USUAL
    assert bench.upstream.requests[-1].path == "/v1/chat/completions"


async def test_nothing_of_this_was_a_mistake_of_the_gateway(bench: Bench) -> None:
    lines = [json.loads(line) for line in bench.gateway.stderr.splitlines()]
    assert [line for line in lines if "exception" in line and line["logger"].startswith("gateway")] == []
