"""What the data listener does with a connection whose answer goes wrong."""

import asyncio

import pytest
from aiohttp import web

from gateway.http.server import DataServer
from gateway.http.whole import WholeAnswer
from tests.listening import listening

REQUEST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"


class Faulty:
    """Answers as it is told to."""

    def __init__(self, way: str) -> None:
        self._way = way

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._way == "line break":
            return WholeAnswer(200, "x-id: a\r\n", "a/b\nb: c", b"{}")
        if self._way == "raises":
            raise RuntimeError("a fault")
        if self._way == "refuses":
            refusal = web.Response(status=401, text="no")
            if "x-leave" in request.headers:
                refusal.force_close()
            return refusal
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise RuntimeError("a fault")


@pytest.mark.parametrize("way", ["line break", "raises", "raises after it began"])
async def test_the_connection_is_closed(way: str) -> None:
    async with listening(DataServer(Faulty(way))) as port:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        async with asyncio.timeout(20):
            said = await reader.read()
        assert b"\nb: c" not in said
        assert said.startswith(b"HTTP/1.1 500 ") == (way == "raises")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("more", ["", "Connection: close\r\n", "x-leave: 1\r\n"])
async def test_a_client_that_still_sends_gets_its_answer(more: str) -> None:
    """Also where the connection ends with it: to close it at once would reset it under the client's hands."""
    piece, pieces = b"x" * 65536, 20
    async with listening(DataServer(Faulty("refuses"))) as port:  # type: ignore[arg-type]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/x HTTP/1.1\r\nHost: a\r\n{more}Content-Length: {len(piece) * pieces}\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(20):
            for _ in range(pieces):
                await asyncio.sleep(0.01)
                writer.write(piece)
                await writer.drain()
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 401 ")
        writer.close()
        await writer.wait_closed()
