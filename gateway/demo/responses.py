"""POST /responses and /responses/input_tokens. Nothing is stored."""

import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway.demo.answer import MAX_TOOLS, Answer, Tool, answer_of, call_of, tool_of
from gateway.demo.events import stream_events
from gateway.demo.fields import Body, boolean, content_text, integer, made_id, objects, read_body, text
from gateway.demo.refusal import Refused, as_json
from gateway.demo.response_events import response_events
from gateway.demo.words import Prompt, count_tokens, words

MAX_ITEMS = 10_000

_STORED = ("previous_response_id", "conversation", "prompt", "background")
_PARTS = ("input_text", "output_text", "text")
# Items whose text is under another name than "content".
_TEXT_OF = {"function_call": "arguments", "function_call_output": "output"}


@dataclass(frozen=True, slots=True)
class _Input:
    """prompt: its text is what the user said last. answered: the last item is not the user's."""

    prompt: Prompt
    answered: bool


async def respond(request: web.Request) -> web.StreamResponse:
    """One response, whole or streamed."""
    body = await read_body(request)
    given, tools, limit = _input(body), _tools(body), integer(body, "max_output_tokens")
    callable_now = () if given.answered or body.get("tool_choice") == "none" else tools
    said = call_of(callable_now, given.prompt.text, limit) or answer_of(
        words(given.prompt.text, limit="max_output_tokens"), limit
    )
    identity = made_id("resp_demo_", await request.read())
    frame = _frame(body, identity)
    item = _item(said, identity.replace("resp_", "fc_" if said.tool else "msg_"))
    ending = _ending(said, item, given.prompt.tokens)
    if boolean(body, "stream"):
        return await stream_events(request, response_events(frame, said, item, ending))
    return as_json({**frame, **ending})


async def count_input(request: web.Request) -> web.Response:
    """How many tokens the input of a response would have."""
    given = _input(await read_body(request))
    return as_json({"object": "response.input_tokens", "input_tokens": given.prompt.tokens})


def _input(body: Body) -> _Input:
    for name in _STORED:
        if body.get(name):
            raise Refused(f"the demo model stores nothing and has no {name}", name)
    tokens = count_tokens(text(body, "instructions") or "")
    if isinstance(given := body.get("input"), str):
        return _Input(Prompt(given, tokens + count_tokens(given)), answered=False)
    if not isinstance(given, list) or not given:
        raise Refused("input must be a text or a list of at least one item", "input")
    last, role = "", None
    for index, item in enumerate(objects(body, "input", MAX_ITEMS)):
        said, role = _said(item, f"input[{index}]"), item.get("role")
        tokens += count_tokens(said)
        last = said if role == "user" else last
    return _Input(Prompt(last, tokens), answered=role != "user")


def _said(item: Body, param: str) -> str:
    kind = str(item.get("type") or "message")
    if kind == "reasoning":
        return ""
    if kind != "message" and kind not in _TEXT_OF:
        raise Refused(f"the demo model reads no {kind}", f"{param}.type")
    name = _TEXT_OF.get(kind, "content")
    return content_text(item.get(name), f"{param}.{name}", _PARTS)


def _tools(body: Body) -> tuple[Tool, ...]:
    found = []
    for index, tool in enumerate(objects(body, "tools", MAX_TOOLS)):
        if tool.get("type") not in ("function", "custom"):
            raise Refused("the demo model has no tools of its own", f"tools[{index}].type")
        if tool["type"] == "function" and (known := tool_of(tool.get("name"), tool.get("parameters"))):
            found.append(known)
    return tuple(found)


def _frame(body: Body, identity: str) -> Body:
    """The response before anything is said."""
    return {
        "id": identity,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": body["model"],
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "metadata": body.get("metadata") or {},
    }


def _item(said: Answer, identity: str) -> Body:
    """What was said, complete."""
    status = "incomplete" if said.cut else "completed"
    if said.tool:
        call = {"id": identity, "type": "function_call", "status": status, "call_id": f"call_{identity[3:]}"}
        return {**call, "name": said.tool, "arguments": said.text}
    part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    return {"id": identity, "type": "message", "status": status, "role": "assistant", "content": [part]}


def _ending(said: Answer, item: Body, input_tokens: int) -> dict[str, Any]:
    """What the response says at its end, besides its frame."""
    output_tokens = len(said.tokens)
    return {
        "status": "incomplete" if said.cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if said.cut else None,
        "output": [item],
        "usage": {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        },
    }
