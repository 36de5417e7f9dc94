"""The events of a streamed response of one item, numbered."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from gateway.demo.answer import Answer
from gateway.demo.events import named_event
from gateway.demo.fields import Body
from gateway.demo.words import TOKEN_SECONDS


async def response_events(frame: Body, said: Answer, item: Body, ending: Body) -> AsyncIterator[bytes]:
    """All events: the response begins, its item comes token by token, the response ends.

    frame: the response before anything is said. ending: what is different at its end.
    """
    for number, (kind, fields) in enumerate(_events(frame, said, item, ending)):
        yield named_event({"type": kind, "sequence_number": number, **fields})
        if kind.endswith(".delta"):
            await asyncio.sleep(TOKEN_SECONDS)


def _events(frame: Body, said: Answer, item: Body, ending: Body) -> Iterator[tuple[str, Body]]:
    yield "response.created", {"response": frame}
    yield "response.in_progress", {"response": frame}
    at: Body = {"item_id": item["id"], "output_index": 0}
    yield from _call(said, item, at) if said.tool else _message(said, item, at)
    yield "response.output_item.done", {"output_index": 0, "item": item}
    yield f"response.{ending['status']}", {"response": {**frame, **ending}}


def _message(said: Answer, item: Body, at: Body) -> Iterator[tuple[str, Body]]:
    [part] = item["content"]
    at = {**at, "content_index": 0}
    yield "response.output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}}
    yield "response.content_part.added", {**at, "part": {**part, "text": ""}}
    for token in said.tokens:
        yield "response.output_text.delta", {**at, "delta": token, "logprobs": []}
    yield "response.output_text.done", {**at, "text": said.text, "logprobs": []}
    yield "response.content_part.done", {**at, "part": part}


def _call(said: Answer, item: Body, at: Body) -> Iterator[tuple[str, Body]]:
    yield "response.output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress", "arguments": ""}}
    for token in said.tokens:
        yield "response.function_call_arguments.delta", {**at, "delta": token}
    yield "response.function_call_arguments.done", {**at, "name": said.tool, "arguments": said.text}
