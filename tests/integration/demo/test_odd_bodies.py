"""Whatever a field holds, the demo model answers or refuses: it never breaks."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp

from gateway.demo.upstream import DemoUpstream
from tests.integration.demo.conftest import MODEL

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "tool"}]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "max_tokens": 5,
        "stop": ["x"],
    },
    "completions": {"prompt": ["a", "b"], "n": 2},
    "embeddings": {"input": [[1, 2], [3]], "encoding_format": "float"},
    "responses": {
        "input": [
            {"type": "function_call_output", "output": "x", "call_id": "1"},
            {"role": "user", "content": [{"type": "input_text", "text": "tool"}]},
        ],
        "instructions": "x",
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "metadata": {"a": "b"},
    },
    "responses/input_tokens": {"input": [{"role": "user", "content": "x"}]},
    "messages": {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "x"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "tool"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "tool"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "stop_sequences": ["x"],
    },
    "messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "moderations": {"input": [{"type": "text", "text": "x"}]},
    "rerank": {"query": "x", "documents": ["x", {"text": "y"}], "top_n": 1, "return_documents": True},
    "images/generations": {"prompt": "x", "size": "16x16", "quality": "low", "n": 2, "background": "auto"},
    "audio/speech": {"input": "x", "voice": "alloy", "response_format": "wav", "stream_format": "sse"},
}
ODD: tuple[Any, ...] = (None, True, -1, 10**400, 1.5, "x", "", [], {}, [[]], [{}], [None], {"type": []}, [{"type": {}}])
EVENTS: list[dict[str, Any]] = [
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"format": {}}}, "instructions": ""}},
    {
        "type": "conversation.item.create",
        "item": {"type": "message", "role": "user", "id": "1", "content": [{"type": "input_audio", "audio": "AAAA"}]},
    },
    {"type": "input_audio_buffer.append", "audio": "AAAA"},
    {"type": "response.create", "response": {"input": [], "max_output_tokens": 1, "output_modalities": ["text"]}},
]


def variants(value: Any) -> Iterator[Any]:
    """The value with one thing in it, at any depth, replaced by each odd one."""
    yield from ODD
    places = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if type(value) is list else []
    for place, inner in places:
        for changed in variants(inner):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[place] = changed
            yield copy


async def test_no_body_breaks_an_endpoint(upstream: DemoUpstream) -> None:
    async with aiohttp.ClientSession() as session:

        async def status_of(path: str, body: Any) -> int:
            async with session.post(f"{upstream.base_url}/{path}", data=json.dumps(body)) as response:
                await response.read()
                return response.status

        asked = [
            (path, {"model": MODEL, **body})
            for path, fields in BODIES.items()
            for body in (fields, *variants(fields))
            if isinstance(body, dict)
        ]
        for begin in range(0, len(asked), 50):
            some = asked[begin : begin + 50]
            statuses = await asyncio.gather(*(status_of(*one) for one in some))
            broken = [one for one, status in zip(some, statuses, strict=True) if status not in (200, 400, 404)]
            assert not broken
        assert {await status_of(path, {"model": MODEL, **fields}) for path, fields in BODIES.items()} == {200}


async def test_no_event_breaks_a_session(upstream: DemoUpstream) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{upstream.base_url}/realtime?model={MODEL}") as socket,
    ):

        async def send_all() -> None:
            for event in EVENTS:
                for changed in variants(event):
                    await socket.send_str(json.dumps(changed))
            await socket.send_json({"type": "last", "event_id": "last"})

        async def receive_all() -> None:
            while (await socket.receive_json()).get("error", {}).get("event_id") != "last":
                pass

        await asyncio.gather(send_all(), receive_all())
