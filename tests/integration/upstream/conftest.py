"""The client under test, on the loop that the gateway runs on and on Python's own, which it runs on elsewhere."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from gateway.config.model import Upstream
from gateway.upstream.client import Pieces, Upload, UpstreamClient
from tests.upstreams.wire import HERE, Guest, Request, Stage, playing

MOST = 2**20


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    client = UpstreamClient()
    yield client
    await client.close()


async def ask(client: UpstreamClient, upstream: Upstream, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of an answer that is not large."""
    async with client.send(upstream, method, "/chat", {}, b"{}" if method == "POST" else None) as answer:
        return answer.status, await answer.body(MOST)


class Listener:
    """An upstream that keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.stage: Stage

    async def part(self, guest: Guest) -> None:
        while True:
            self.requests.append(await guest.request())
            await guest.say(HERE)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    async with playing(listener.part) as listener.stage:
        yield listener


async def send(
    client: UpstreamClient,
    listener: Listener,
    method: str = "POST",
    path: str = "/chat/completions",
    headers: Mapping[str, str] | None = None,
    body: bytes | Pieces | Upload | None = b"{}",
    upstream: Upstream | None = None,
) -> Request:
    async with client.send(upstream or listener.stage.upstream(), method, path, headers or {}, body) as answer:
        assert await answer.body(100) == b"here"
    return listener.requests[-1]
