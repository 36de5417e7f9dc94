"""Writes what a stream hands out to a client that may be slow to read, or gone."""

import asyncio
from collections.abc import Awaitable

from aiohttp import web

_CLIENT_STALL_S = 60.0
#: What may wait to be sent to a client that keeps up with its stream: too little to pause the writing.
KEEPS_UP_BYTES = 2**15


async def write(request: web.BaseRequest, response: web.StreamResponse, block: bytes) -> None:
    """Write a part of the answer to request, which has begun; but do not wait for ever for a client that does not read:
    it counts as gone.

    Raises ConnectionResetError.
    """
    writer, transport = request.writer, request.transport
    if not getattr(writer, "chunked", False):
        await _within_limit(response.write(block))
        return
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has hung up")
    # Past aiohttp's writer, and without a timer unless there is something to wait for: 2 µs in place of 9.
    transport.write(b"%x\r\n%b\r\n" % (len(block), block))
    if request.protocol.writing_paused:
        await _within_limit(writer.drain())


def chunked_transport(request: web.BaseRequest, response: web.StreamResponse) -> asyncio.Transport | None:
    """Where chunks of the answer to request can be written past aiohttp's writer; None unless it has begun with one."""
    return request.transport if response.prepared and getattr(request.writer, "chunked", False) else None


async def write_last(response: web.StreamResponse, block: bytes) -> None:
    """The same of the answer's last part. Raises ConnectionResetError."""
    await _within_limit(response.write(block))
    await _within_limit(response.write_eof())


async def _within_limit(writing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_CLIENT_STALL_S):
            await writing
    except TimeoutError:
        raise ConnectionResetError("the client does not read") from None
