"""Writes what a stream hands out to a client that may be slow to read, or gone."""

import asyncio
from collections.abc import Awaitable

from aiohttp import web

_CLIENT_STALL_S = 60.0
#: What may wait to be sent to a client that keeps up with its stream; far less than what pauses the writing.
_KEEPS_UP_BYTES = 2**15


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
    write_at_once(request, block)
    if request.protocol.writing_paused:
        await _within_limit(writer.drain())


def keeps_up(request: web.BaseRequest, block: bytes) -> bool:
    """Whether a part of the answer to request, which has begun, may be written without waiting for the client."""
    transport = request.transport
    return (
        transport is not None
        and not transport.is_closing()
        and transport.get_write_buffer_size() + len(block) < _KEEPS_UP_BYTES
        and getattr(request.writer, "chunked", False)
    )


def write_at_once(request: web.BaseRequest, block: bytes) -> None:
    """Write a part of the answer to request, as one chunk."""
    assert request.transport is not None
    # Past aiohttp's writer, and without a timer unless there is something to wait for: 2 µs in place of 9.
    request.transport.write(b"%x\r\n%b\r\n" % (len(block), block))


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
