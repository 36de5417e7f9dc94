"""A reader who leaves in the middle of an answer is no error of the demo model, which goes on for the others."""

import logging

import aiohttp
import pytest

from gateway.demo.upstream import DemoUpstream
from tests.integration.demo.conftest import MODEL


async def test_those_who_leave_are_not_complained_of(caplog: pytest.LogCaptureFixture) -> None:
    async with DemoUpstream([MODEL]) as upstream, aiohttp.ClientSession() as session:
        speech = {"model": MODEL, "input": "Hello " * 600}
        response = await session.post(f"{upstream.base_url}/audio/speech", json=speech)
        assert await response.content.read(44) != b""
        response.close()
        socket = await session.ws_connect(f"{upstream.base_url}/realtime?model={MODEL}")
        await socket.send_json({"type": "response.create"})
        for _ in range(8):
            await socket.receive_json()
        await socket.close()
        async with session.get(f"{upstream.base_url}/models") as answer:
            assert answer.status == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
