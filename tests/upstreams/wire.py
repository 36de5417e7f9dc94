"""An upstream that a test plays by hand, byte for byte: ``async with playing(part) as stage``.

The part is a coroutine that gets each connection as it is opened. What goes wrong in it fails the test.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.config.model import Upstream

OK = b"HTTP/1.1 200 OK\r\n"
HERE = OK + b"Content-Length: 4\r\n\r\nhere"
#: The first half of a stream, and the second.
STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n"
REST = b"2\r\nre\r\n0\r\n\r\n"
END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """What was sent. lines: of the head, as they came; body: without its chunks."""

    lines: list[str]
    body: bytes

    def header(self, name: str) -> list[str]:
        """All values of a header."""
        pairs = (line.partition(": ") for line in self.lines[1:])
        return [value for said, _, value in pairs if said.lower() == name.lower()]


class Guest:
    """One connection, from the server's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> list[str]:
        """The head of the next request. Raises IncompleteReadError where none comes."""
        text = await self.reader.readuntil(b"\r\n\r\n")
        return text.decode("utf-8", "surrogateescape").split("\r\n")[:-2]

    async def request(self) -> Request:
        """The next request, whole."""
        request = Request(await self.head(), b"")
        if request.header("Transfer-Encoding"):
            body = b""
            while size := int(await self.reader.readuntil(b"\n"), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readline() == b"\r\n"
            assert await self.reader.readline() == b"\r\n"
            return Request(request.lines, body)
        length = int((request.header("Content-Length") or ["0"])[0])
        return Request(request.lines, await self.reader.readexactly(length))

    async def say(self, *blocks: bytes) -> None:
        """Send the blocks, one after the other, as far as the other side reads."""
        for block in blocks:
            if self.writer.is_closing():
                raise ConnectionResetError
            self.writer.write(block)
            await self.writer.drain()

    async def left(self) -> None:
        """Return once the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(2**16):
                pass

    async def hang_up(self) -> None:
        """Close, and return when it is closed."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Close as a server does that has crashed."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Part = Callable[[Guest], Awaitable[None]]


@dataclass
class Stage:
    """The server. guests: all connections there were. scenes: what is played to each."""

    port: int
    scheme: str
    guests: list[Guest] = field(default_factory=list)
    scenes: list[asyncio.Task[None]] = field(default_factory=list)

    def upstream(self, host: str = "127.0.0.1", **settings: object) -> Upstream:
        """It as an upstream, which may be silent for long unless the settings say otherwise."""
        return Upstream("wire", f"{self.scheme}://{host}:{self.port}/v1", None, **settings)  # type: ignore[arg-type]

    async def all_left(self) -> None:
        """Return once all connections are closed by the other side, and what is played is at its end."""
        await asyncio.gather(*self.scenes)
        await asyncio.gather(*(guest.left() for guest in self.guests))


@asynccontextmanager
async def playing(part: Part, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Stage]:
    """The server on a free port, for the time of the block."""

    async def play(guest: Guest) -> None:
        # A client that leaves is no fault of the part; a wrong assertion is.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await part(guest)

    def open_curtain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = Guest(reader, writer)
        stage.guests.append(guest)
        stage.scenes.append(asyncio.get_running_loop().create_task(play(guest)))

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = await asyncio.start_server(open_curtain, host, 0, family=family, ssl=tls)
    stage = Stage(server.sockets[0].getsockname()[1], "https" if tls else "http")
    try:
        yield stage
    finally:
        server.close()
        for scene in stage.scenes:
            if not scene.done():
                scene.cancel()
        ends = await asyncio.gather(*stage.scenes, return_exceptions=True)
        for guest in stage.guests:
            guest.writer.transport.abort()
        await server.wait_closed()
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def say_here(guest: Guest) -> None:
    """The part of an upstream that answers whatever it is asked."""
    while True:
        await guest.request()
        await guest.say(HERE)


def sized(body: bytes, *headers: bytes) -> bytes:
    """An answer that says how long it is."""
    return OK + b"".join(header + b"\r\n" for header in headers) + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(*chunks: bytes) -> bytes:
    """An answer in chunks, without its end."""
    return OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk_of, chunks))


def chunk_of(block: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(block), block)
