"""Server-sent events."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
from aiohttp import web

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """An event that has only data."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """An event whose name is the value's type."""
    return b"event: " + str(value["type"]).encode() + b"\n" + event(value)


async def stream_events(request: web.Request, events: AsyncIterator[bytes]) -> web.StreamResponse:
    """Answer with the events, each sent as it comes."""
    return await stream(request, events, "text/event-stream")


async def stream(request: web.Request, pieces: AsyncIterator[bytes], content_type: str) -> web.StreamResponse:
    """Answer with the pieces, each sent as it comes, until the reader leaves."""
    response = web.StreamResponse(headers={"Content-Type": content_type, "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for piece in pieces:
            await response.write(piece)
        await response.write_eof()
    except ConnectionResetError:
        pass  # the reader has left; there is nobody to tell
    return response
