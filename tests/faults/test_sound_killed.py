"""A gateway dies while it passes sound on: all of it is charged once its price was recorded, and nothing before."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.faults.table import measured
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.upstreams.local import LocalUpstream

SAID = "How long will this go on?"
PRICE = Decimal(15 * len(SAID)) / 1_000_000


class Voice(LocalUpstream):
    """Begins to speak, and goes on for as long as anybody listens."""

    def __init__(self) -> None:
        super().__init__(web.post("/v1/audio/speech", self._speak))

    async def _speak(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/wav"})
        await response.prepare(request)
        while True:
            await response.write(b"sound" * 100)
            await asyncio.sleep(0.05)


@pytest.fixture
async def voice() -> AsyncIterator[Voice]:
    async with Voice() as voice:
        yield voice


def lease_of(gateway: Gateway) -> str:
    (reservation,) = gateway.cli("reservations", "list")["data"]
    return str(reservation["lease_expires_at"])


@pytest.mark.long
@pytest.mark.parametrize("recorded", [True, False])
async def test_sound_of_a_killed_gateway_is_charged_once_its_price_was_recorded(
    voice: Voice, tmp_path: Path, recorded: bool
) -> None:
    config = gateway_config(voice.base_url, [])
    config["models"]["models"]["voice"] = {"upstream": "test", "character_price": "15"}
    body = {"model": "voice", "input": SAID, "voice": "alloy"}
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        headers = {"Authorization": f"Bearer {gateway.key}"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{gateway.base_url}/audio/speech", json=body, headers=headers) as answer,
        ):
            assert (await answer.content.readexactly(1000)).startswith(b"sound")
            began = lease_of(gateway)
            while recorded and lease_of(gateway) == began:
                await answer.content.readany()
            gateway.kill()
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        while gateway.cli("reservations", "list")["data"]:
            await asyncio.sleep(0.05)
        used = Decimal(gateway.cli("credits", "show", "default")["allowance"]["used"])
        assert used == (PRICE if recorded else 0)
        assert gateway.cli("ledger", "verify")
    if not recorded:
        measured("gateway killed, sound", len(SAID), "characters", f"sound of {len(SAID)} characters")
