"""Streams that are large or odd, through the real gateway process: the client gets them byte for byte, they are charged
by their usage, and what is too large ends in an error that is seen."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.acceptance.conftest import funds_of
from tests.acceptance.memory import forget_peak, peak_bytes
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "odd"
PROMPT_TOKENS, COMPLETION_TOKENS = 9, 4
MIB = 2**20
CHAT, MESSAGES, RESPONSES = "/chat/completions", "/messages", "/responses"


class Script(LocalUpstream):
    """Streams the pieces of ``says``, each by itself."""

    def __init__(self) -> None:
        super().__init__(web.post("/v1/{path:.*}", self._answer))
        self.says: list[bytes] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.says:
            await response.write(piece)
            await asyncio.sleep(0)  # the bytes of one write may be sent by themselves
        return response


@dataclass(frozen=True)
class Bench:
    gateway: Gateway
    upstream: Script
    session: aiohttp.ClientSession

    async def stream(self, path: str, pieces: list[bytes], **fields: Any) -> bytes:
        """What a client that asks for no usage gets of a stream that comes in these pieces."""
        self.upstream.says = pieces
        body: dict[str, Any] = {"model": MODEL, "stream": True, **fields}
        if path == RESPONSES:
            body |= {"input": "Hello!", "max_output_tokens": 100}
        else:
            body |= {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 100}
        headers = {"Authorization": f"Bearer {self.gateway.key}"}
        async with asyncio.timeout(60):
            async with self.session.post(self.gateway.base_url + path, json=body, headers=headers) as answer:
                assert answer.status == 200
                return await answer.read()

    def left(self) -> Decimal:
        """All that the account has, once nothing is held: a stream is charged before its end is handed out."""
        funds = funds_of(self.gateway)
        assert (funds.held, funds.balance_held) == (0, 0)
        return funds.remaining + funds.balance


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("odd") / "data"
    async with Script() as upstream, aiohttp.ClientSession() as session:
        config = gateway_config(upstream.base_url, [MODEL], context_window=2_000_000, max_output_tokens=1_000_000)
        with running_gateway(config, data_dir=data_dir) as gateway:
            gateway.cli("credits", "grant", "default", "1000")
            yield Bench(gateway, upstream, session)


def told(document: Any, end: bytes = b"\n\n", field: bytes = b"data: ") -> bytes:
    return field + json.dumps(document).encode() + end


def word(text: str) -> Any:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USED = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
USAGE = {"choices": [], "usage": USED}
#: The same stream, written in ways that all mean the same. The usage stands on the last chunk, which is not hidden.
LAST = {**FINISH, "usage": USED}
PLAIN = [told(word("Hello")), told(word(" there")), told(LAST), b"data: [DONE]\n\n"]
STREAMS: dict[str, list[bytes]] = {
    "LF": PLAIN,
    "CRLF": [piece.replace(b"\n", b"\r\n") for piece in PLAIN],
    "CR": [piece.replace(b"\n", b"\r") for piece in PLAIN],
    "mixed": [PLAIN[0].replace(b"\n", b"\r\n"), PLAIN[1].replace(b"\n", b"\r"), *PLAIN[2:]],
    "in one piece": [b"".join(PLAIN)],
    "by byte": [bytes([byte]) for piece in PLAIN for byte in piece],
    "CRLF by byte": [bytes([byte]) for piece in PLAIN for byte in piece.replace(b"\n", b"\r\n")],
    "no space": [piece.replace(b"data: ", b"data:") for piece in PLAIN],
    "byte order mark": [b"\xef\xbb\xbf", *PLAIN],
    "byte order mark and all": [b"\xef\xbb\xbf" + b"".join(PLAIN)],
    "comments": [b": hello\n\n", PLAIN[0], b":\n\n:\n\n", *PLAIN[1:3], b": waiting\n\n", PLAIN[3]],
    "other fields": [b"event: x\nid: 1\nretry: 5\nfoo: bar\n" + piece for piece in PLAIN],
    "an id with a NUL": [b"id: \0\n" + piece for piece in PLAIN],
    "data on several lines": [
        *PLAIN[:2], json.dumps(LAST, indent=1).replace("\n", "\ndata: ").join(["data: ", "\n\n"]).encode(), PLAIN[3],
    ],
    "no data": [b"data\n\n", b"data:\n\n", *PLAIN],
    "many blank lines": [piece + b"\n\n\n" for piece in PLAIN[:3]] + PLAIN[3:],
    "no blank line at the end": [*PLAIN[:3], b"data: [DONE]"],
    "half a line end": [*PLAIN[:3], b"data: [DONE]\n"],
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_is_passed_on_as_it_came_and_charged(bench: Bench, name: str) -> None:
    before = bench.left()
    assert await bench.stream(CHAT, STREAMS[name], stream_options={"include_usage": False}) == b"".join(STREAMS[name])
    assert bench.left() == before - cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)


MESSAGE = [
    {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": PROMPT_TOKENS, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello there, you"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": COMPLETION_TOKENS}},
    {"type": "message_stop"},
]  # fmt: skip
RESPONSE = [
    {"type": "response.created", "response": {"id": "r", "status": "in_progress", "output": []}},
    {"type": "response.output_text.delta", "item_id": "i", "output_index": 0, "content_index": 0, "delta": "Hello"},
    {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": [],
     "usage": {"input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS}}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "events"), [(MESSAGES, MESSAGE), (RESPONSES, RESPONSE)], ids=["messages", "responses"]
)
@pytest.mark.parametrize("way", ["LF", "CRLF", "CR", "by byte", "mark"])
async def test_streams_of_other_endpoints_are_charged_however_they_are_written(
    bench: Bench, path: str, events: list[dict[str, Any]], way: str
) -> None:
    end = {"CRLF": b"\r\n", "CR": b"\r"}.get(way, b"\n")
    whole = b"".join(
        b"event: " * (way != "mark") + event["type"].encode() * (way != "mark") + end * (way != "mark")
        + b"data: " + json.dumps(event).encode() + end + end
        for event in events
    )  # fmt: skip
    if way == "mark":  # it stands before the first field, which then must be that with the data
        whole = b"\xef\xbb\xbf" + whole
    pieces = [bytes([byte]) for byte in whole] if way == "by byte" else [whole]
    before = bench.left()
    out = await bench.stream(path, pieces)
    assert bench.left() == before - cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)
    last = json.loads(out.strip().split(b"data: ")[-1 if path == RESPONSES else -2].splitlines()[0])
    usage = last["response"]["usage"] if path == RESPONSES else last["usage"]
    assert Decimal(usage["credits"]["cost"]) == cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)


@pytest.mark.parametrize("size", [MIB, 15 * MIB])
@pytest.mark.parametrize("step", [2**14, 2**24], ids=["in pieces", "at once"])
async def test_a_large_event_passes(bench: Bench, size: int, step: int) -> None:
    large = told({**word("x" * 100), "padding": "y" * size})
    pieces = [large[place : place + step] for place in range(0, len(large), step)]
    before, memory = bench.left(), forget_peak(bench.gateway)
    whole = [*pieces, *PLAIN]
    assert await bench.stream(CHAT, whole, stream_options={"include_usage": False}) == b"".join(whole)
    assert bench.left() == before - cost_of(PROMPT_TOKENS, COMPLETION_TOKENS)
    assert peak_bytes(bench.gateway) - memory < 8 * size + 16 * MIB


async def test_a_large_text_without_usage_is_charged_to_its_limit(bench: Bench) -> None:
    before = bench.left()
    text = "x" * MIB
    whole = [told(word(text)), told(FINISH), b"data: [DONE]\n\n"]
    out = await bench.stream(CHAT, whole)
    spent = before - bench.left()
    assert out == b"".join(whole)
    assert cost_of(1, 100) <= spent <= cost_of(100, 100)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_an_event_without_end_ends_in_an_error_and_costs_nothing(bench: Bench, path: str) -> None:
    begun = {
        CHAT: [told(word("Hello"))],
        MESSAGES: [told(event) for event in MESSAGE[:3]],
        RESPONSES: [told(RESPONSE[1])],
    }
    before, memory = bench.left(), forget_peak(bench.gateway)
    out = await bench.stream(path, [*begun[path], b"data: ", *([b"z" * MIB] * 40)])
    assert out.startswith(b"".join(begun[path]))
    error = json.loads(out.removeprefix(b"".join(begun[path])).rpartition(b"data: ")[2])
    assert (error.get("code") or error["error"]["code"]) == "upstream_unavailable"
    assert bench.left() == before
    assert peak_bytes(bench.gateway) - memory < 64 * MIB
