"""POST /messages and /messages/count_tokens, in Anthropic's shapes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from gateway.demo.answer import MAX_TOOLS, Answer, Tool, answer_of, call_of, tool_of
from gateway.demo.events import named_event, stream_events
from gateway.demo.fields import Body, boolean, content_text, integer, made_id, objects, read_body, texts
from gateway.demo.refusal import Refused, as_json
from gateway.demo.words import TOKEN_SECONDS, Prompt, count_tokens, words

MAX_STOPS = 16

_CALL_ID = "toolu_demo"


@dataclass(frozen=True, slots=True)
class _Turn:
    """prompt: its text is what the user said last. answered: the last message answers a tool's call."""

    prompt: Prompt
    answered: bool


async def message(request: web.Request) -> web.StreamResponse:
    """One message, whole or streamed."""
    body = await read_body(request)
    turn, limit = _turn(body), integer(body, "max_tokens")
    if limit is None:
        raise Refused("max_tokens: field required", "max_tokens")
    tools = () if turn.answered or body.get("tool_choice") == {"type": "none"} else _tools(body)
    stops = texts(body, "stop_sequences", MAX_STOPS)
    said = call_of(tools, turn.prompt.text, limit) or answer_of(words(turn.prompt.text), limit, stops)
    frame = {
        "id": made_id("msg_demo_", await request.read()),
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(turn, 1),
    }
    if boolean(body, "stream"):
        return await stream_events(request, _events(frame, said, turn))
    usage = _usage(turn, len(said.tokens))
    return as_json({**frame, "content": [_block(said)], **_ending(said), "usage": usage})


async def count_input(request: web.Request) -> web.Response:
    """How many input tokens a message would have."""
    return as_json({"input_tokens": _turn(await read_body(request)).prompt.tokens})


def _turn(body: Body) -> _Turn:
    tokens = count_tokens(content_text(body.get("system"), "system"))
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", "messages")
    last, answered = "", False
    for index, each in enumerate(messages):
        if not isinstance(each, dict) or each.get("role") not in ("user", "assistant"):
            raise Refused("a message must be an object with the role user or assistant", f"messages[{index}]")
        blocks = list(_texts(each.get("content"), f"messages[{index}].content"))
        tokens += sum(count_tokens(text) for _, text in blocks)
        answered = any(kind == "tool_result" for kind, _ in blocks)
        if each["role"] == "user":
            last = "".join(text for kind, text in blocks if kind == "text") or last
    return _Turn(Prompt(last, tokens), answered)


def _texts(content: object, param: str) -> Iterator[tuple[str, str]]:
    """The type and the text of each block."""
    if isinstance(content, str) or content is None:
        yield "text", content or ""
        return
    for block in objects({param: content}, param, 100_000):
        kind = block.get("type")
        if kind == "tool_use":
            yield kind, orjson.dumps(block.get("input")).decode()
        elif kind == "tool_result":
            yield kind, content_text(block.get("content"), param)
        elif kind not in ("thinking", "redacted_thinking"):
            yield "text", content_text([block], param)


def _tools(body: Body) -> tuple[Tool, ...]:
    found = []
    for tool in objects(body, "tools", MAX_TOOLS):
        if tool.get("type") not in (None, "custom"):
            raise Refused("the demo model has no tools of its own", "tools")
        if known := tool_of(tool.get("name"), tool.get("input_schema")):
            found.append(known)
    return tuple(found)


def _usage(turn: _Turn, output: int) -> Body:
    return {
        "input_tokens": turn.prompt.tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output,
    }


def _block(said: Answer) -> dict[str, Any]:
    if said.tool:
        # What a limit has cut is no JSON: a whole message has only whole arguments.
        arguments = {} if said.cut else orjson.loads(said.text)
        return {"type": "tool_use", "id": _CALL_ID, "name": said.tool, "input": arguments}
    return {"type": "text", "text": said.text}


def _ending(said: Answer) -> Body:
    if said.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": said.stop}
    reason = "max_tokens" if said.cut else "tool_use" if said.tool else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


async def _events(frame: Body, said: Answer, turn: _Turn) -> AsyncIterator[bytes]:
    yield named_event({"type": "message_start", "message": frame})
    empty: Body = {"input": {}} if said.tool else {"text": ""}
    yield named_event({"type": "content_block_start", "index": 0, "content_block": {**_block(said), **empty}})
    yield named_event({"type": "ping"})
    kind, name = ("input_json_delta", "partial_json") if said.tool else ("text_delta", "text")
    for token in said.tokens:
        yield named_event({"type": "content_block_delta", "index": 0, "delta": {"type": kind, name: token}})
        await asyncio.sleep(TOKEN_SECONDS)
    yield named_event({"type": "content_block_stop", "index": 0})
    yield named_event({"type": "message_delta", "delta": _ending(said), "usage": _usage(turn, len(said.tokens))})
    yield named_event({"type": "message_stop"})
