"""The connections to upstreams."""

import asyncio
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from aiohttp import web

from gateway.config.model import Upstream
from gateway.upstream import client as client_module
from gateway.upstream.client import UpstreamClient, UpstreamUnavailable


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    client = UpstreamClient()
    yield client
    await client.close()


async def ask(client: UpstreamClient, port: int) -> bytes:
    async with client.send(Upstream("test", f"http://127.0.0.1:{port}/v1", None), "POST", "/chat", {}, b"{}") as answer:
        return await answer.body(1000)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def test_a_connection_that_is_not_to_be_had_is_tried_once_more(
    client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = free_port(), []

    async def answer(request: web.Request) -> web.Response:
        requests.append(await request.read())
        return web.Response(body=b"here")

    app = web.Application()
    app.add_routes([web.post("/v1/chat", answer)])
    runner = web.AppRunner(app)
    await runner.setup()

    async def the_server_comes_back(_: float) -> None:
        await web.TCPSite(runner, "127.0.0.1", port).start()

    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(sleep=the_server_comes_back))
    assert await ask(client, port) == b"here"
    assert requests == [b"{}"]
    await runner.cleanup()


async def test_a_server_that_stays_away_is_unavailable(client: UpstreamClient) -> None:
    with pytest.raises(UpstreamUnavailable):
        await ask(client, free_port())


async def test_a_request_that_was_sent_is_never_sent_again(client: UpstreamClient) -> None:
    connections, gone = 0, asyncio.Event()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"{}")
        writer.close()
        await writer.wait_closed()
        gone.set()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        with pytest.raises(UpstreamUnavailable):
            await ask(client, server.sockets[0].getsockname()[1])
        await gone.wait()
    assert connections == 1
