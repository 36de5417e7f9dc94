"""A reader who leaves in the middle of an answer is no error of the demo model, which goes on for the others."""

import json
import logging

import aiohttp
import pytest
from websockets.asyncio.client import connect

from gateway.demo.upstream import DemoUpstream
from tests.integration.demo.conftest import MODEL


async def still_answers(session: aiohttp.ClientSession, upstream: DemoUpstream) -> None:
    async with session.get(f"{upstream.base_url}/models") as answer:
        assert answer.status == 200


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_listener_who_leaves_is_not_complained_of(caplog: pytest.LogCaptureFixture) -> None:
    async with DemoUpstream([MODEL]) as upstream, aiohttp.ClientSession() as session:
        speech = {"model": MODEL, "input": "Hello " * 600}
        response = await session.post(f"{upstream.base_url}/audio/speech", json=speech)
        assert await response.content.read(44) != b""
        response.close()
        await still_answers(session, upstream)
    assert complaints(caplog) == []


@pytest.mark.parametrize("politely", [True, False])
async def test_a_talker_who_leaves_is_not_complained_of(caplog: pytest.LogCaptureFixture, politely: bool) -> None:
    async with DemoUpstream([MODEL]) as upstream, aiohttp.ClientSession() as session:
        socket = await connect(f"ws{upstream.base_url.removeprefix('http')}/realtime?model={MODEL}")
        assert json.loads(await socket.recv())["type"] == "session.created"
        await socket.send(json.dumps({"type": "response.create"}))
        while json.loads(await socket.recv())["type"] != "response.output_audio.delta":
            pass
        if politely:
            await socket.close()
        else:
            for _ in range(200):
                await socket.send(json.dumps({"type": "what is answered at once"}))
            socket.transport.abort()
            await socket.wait_closed()
        await still_answers(session, upstream)
    assert complaints(caplog) == []
