"""HTTP as bytes on a socket, for what no client library would send, or not read."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.gateway_process import Gateway

SECONDS = 60
_READ_AHEAD_BYTES = 2**14


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came. headers: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of the error that it must be."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return str(error["code"])


def head_of(
    gateway: Gateway, *headers: str, key: str | None = None, path: str = "/chat/completions", method: str = "POST"
) -> bytes:
    """A request's head, with these header lines besides those that all have."""
    target = urlsplit(gateway.base_url).path + path
    lines = [f"{method} {target} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {key or gateway.key}", *headers]
    return "\r\n".join((*lines, "", "")).encode()


@dataclass
class Line:
    """A connection to the gateway's data listener."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> None:
        """Send bytes; the gateway may be gone."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """The next answer's status and headers. Raises IncompleteReadError where none comes."""
        async with asyncio.timeout(SECONDS):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}

    async def answer(self) -> RawAnswer:
        """The next answer, whose body has a length."""
        status, headers = await self.head()
        async with asyncio.timeout(SECONDS):
            return RawAnswer(status, headers, await self.reader.readexactly(int(headers.get("content-length", "0"))))

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        async with asyncio.timeout(SECONDS):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def rest(self) -> bytes:
        """All that comes until the gateway closes the connection."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.read()

    def hang_up(self) -> None:
        """Close the connection at once."""
        self.writer.transport.abort()


@asynccontextmanager
async def line_to(gateway: Gateway, *, receive_bytes: int | None = None) -> AsyncIterator[Line]:
    """A connection for the time of the block. receive_bytes: the kernel's buffer for what is not read yet."""
    address = urlsplit(gateway.base_url)
    assert address.hostname is not None
    assert address.port is not None
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (address.hostname, address.port))
    # The smaller the reader's own limit, the sooner it stops reading ahead.
    reader, writer = await asyncio.open_connection(sock=sock, limit=_READ_AHEAD_BYTES)
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()
