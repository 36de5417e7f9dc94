"""Clients that read slowly, or not at all, through the real gateway process: the upstream waits for them, and what the
gateway keeps for each of them is bounded."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.acceptance.conftest import Answer, ask, funds_of
from tests.acceptance.memory import forget_peak, peak_bytes
from tests.acceptance.raw_http import Line, head_of, line_to
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "spring"
MIB = 2**20
PADDING_BYTES = 100_000
PROMPT_TOKENS = 9
#: So many answers in a row in which a stream does not move are more than a pause.
STILL_ROUNDS = 50
SECONDS = 60


@dataclass
class Told:
    """One stream as the upstream saw it. sent: bytes that its connection has taken."""

    events: int
    sent: int = 0
    left: bool = False


class Spring(LocalUpstream):
    """Streams as many large events as the request's ``max_tokens`` says, each a token and a number."""

    def __init__(self) -> None:
        super().__init__(web.post("/v1/{path:.*}", self._answer))
        self.told: list[Told] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        told = Told((await request.json())["max_tokens"])
        self.told.append(told)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            for number in range(told.events):
                told.sent += await _write(response, event_of(number))
            await _write(response, END_OF[told.events])
        except (ConnectionError, asyncio.CancelledError):
            told.left = True
            raise
        return response


async def _write(response: web.StreamResponse, block: bytes) -> int:
    await response.write(block)
    return len(block)


def event_of(number: int) -> bytes:
    """An event of one token, and of much else that no client looks at."""
    choice = {"index": 0, "delta": {"content": f" {number}"}, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice], "padding": "x" * PADDING_BYTES}).encode() + b"\n\n"


class _Ends(dict[int, bytes]):
    def __missing__(self, events: int) -> bytes:
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": events}
        said = [
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        return b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in said) + b"data: [DONE]\n\n"


END_OF = _Ends()


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Spring
    session: aiohttp.ClientSession

    async def look(self) -> None:
        """A round trip to the gateway that asks for nothing."""
        async with self.session.get(self.gateway.admin_url + "/livez") as answer:
            assert answer.status == 200

    async def stand_still(self) -> None:
        """Return once no stream moves any more."""
        still, before = 0, -1
        async with asyncio.timeout(SECONDS):
            while still < STILL_ROUNDS:
                await self.look()
                now = sum(told.sent for told in self.upstream.told)
                still, before = (still + 1 if now == before else 0), now

    async def ended(self, count: int) -> None:
        """Return once the gateway has ended so many requests."""
        async with asyncio.timeout(2 * SECONDS):
            while self.requests_logged() < count:
                await self.look()

    def requests_logged(self) -> int:
        return sum('"message":"request"' in line for line in self.gateway.stderr.splitlines())

    def connections(self) -> int:
        """How many sockets the process has open."""
        descriptors = Path(f"/proc/{self.gateway.pid}/fd")
        return sum(str(name.readlink()).startswith("socket:") for name in descriptors.iterdir() if name.is_symlink())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("readers") / "data"
    async with Spring() as upstream, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        with running_gateway(gateway_config(upstream.base_url, [MODEL]), data_dir=data_dir) as gateway:
            gateway.cli("credits", "grant", "default", "10")
            yield Bench(gateway, upstream, session)


def body_of(events: int) -> bytes:
    said: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
    return json.dumps(said | {"max_tokens": events, "stream": True, "stream_options": {"include_usage": True}}).encode()


async def begin(bench: Bench, line: Line, events: int) -> None:
    """Ask for a stream, and read no more of its answer than the head."""
    body = body_of(events)
    await line.say(head_of(bench.gateway, f"Content-Length: {len(body)}") + body)
    assert (await line.head())[0] == 200


async def read_all(line: Line, events: int) -> list[str]:
    """Read the stream to its end; the events in order, each without its padding."""
    left, texts = b"", []
    while chunk := await line.chunk():
        *whole, left = (left + chunk).split(b"\n\n")
        texts += [event.replace(b"x" * PADDING_BYTES, b"").decode() for event in whole]
    assert left == b""
    return texts


def expected(number: int) -> str:
    return event_of(number).replace(b"x" * PADDING_BYTES, b"").decode().strip()


async def test_the_upstream_waits_for_a_client_that_does_not_read(bench: Bench) -> None:
    events = 1200
    size = events * len(event_of(0))
    assert size > 100 * MIB
    before = forget_peak(bench.gateway)
    async with line_to(bench.gateway, receive_bytes=4096) as line:
        await begin(bench, line, events)
        await bench.stand_still()
        assert bench.upstream.told[-1].sent < size / 3  # what the buffers of two connections hold
        assert peak_bytes(bench.gateway) - before < 32 * MIB
        texts = await read_all(line, events)
    assert texts[:events] == [expected(number) for number in range(events)]
    assert texts[-1] == "data: [DONE]"
    assert json.loads(texts[-2].removeprefix("data: "))["usage"]["completion_tokens"] == events
    assert json.loads(texts[-2].removeprefix("data: "))["usage"]["cost"] == float(cost_of(PROMPT_TOKENS, events))
    assert peak_bytes(bench.gateway) - before < 32 * MIB


async def test_many_slow_readers_have_little_each_and_keep_nobody_waiting(bench: Bench) -> None:
    readers, events = 50, 200
    before = forget_peak(bench.gateway)
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(line_to(bench.gateway, receive_bytes=4096)) for _ in range(readers)]
        await asyncio.gather(*(begin(bench, line, events) for line in lines))
        await bench.stand_still()
        assert all(told.sent < told.events * PADDING_BYTES for told in bench.upstream.told[-readers:])
        assert peak_bytes(bench.gateway) - before < readers * 3 * MIB / 2
        # Somebody who reads is served meanwhile.
        answer: Answer = await ask(bench.session, bench.gateway, str(bench.gateway.key), body_of(5))
        assert len(answer.events) == 7
        # Those who read on get everything; who leaves is charged for what came.
        first, *others = lines
        for line in others[3:]:
            line.hang_up()
        texts = await asyncio.gather(*(read_all(line, events) for line in (first, *others[:3])))
        assert all(text[:events] == [expected(number) for number in range(events)] for text in texts)
    await bench.ended(readers + 2)
    funds = funds_of(bench.gateway)
    assert (funds.held, funds.balance_held) == (0, 0)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_client_that_never_reads_counts_as_gone(bench: Bench) -> None:
    await bench.look()  # over a connection that stays
    before, ended = bench.connections(), bench.requests_logged()
    async with line_to(bench.gateway, receive_bytes=4096) as line:
        await begin(bench, line, 1200)
        await bench.stand_still()
        await bench.ended(ended + 1)
        async with asyncio.timeout(SECONDS):
            while not bench.upstream.told[-1].left:
                await bench.look()
        last = json.loads([line for line in bench.gateway.stderr.splitlines() if '"message":"request"' in line][-1])
        assert last["reason"] == "client_closed"
        funds = funds_of(bench.gateway)
        assert (funds.held, funds.balance_held) == (0, 0)
        # Though its client is still there, its connection is not.
        async with asyncio.timeout(SECONDS):
            while bench.connections() > before:
                await bench.look()
