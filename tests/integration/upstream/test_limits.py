"""How long an upstream may take."""

import asyncio
import contextlib

import pytest

from gateway.config.model import Upstream
from gateway.upstream.client import DeadlinePassed, UpstreamClient, UpstreamTimeout, UpstreamUnavailable
from tests.integration.upstream.conftest import ask
from tests.upstreams.wire import HERE, OK, REST, STREAM, Guest, playing


async def test_connecting_may_not_take_too_long(client: UpstreamClient) -> None:
    async with playing(Guest.left) as stage:  # it takes the connection, but not its handshake
        upstream = Upstream("test", f"https://127.0.0.1:{stage.port}/v1", None, connect_timeout_ms=50)
        with pytest.raises(UpstreamUnavailable, match="too long"):
            await ask(client, upstream)
        await stage.all_left()
        assert len(stage.guests) == 1


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", OK, STREAM])
async def test_an_upstream_may_not_be_silent_for_too_long(client: UpstreamClient, said: bytes) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(said)
        await guest.left()

    async with playing(part) as stage:
        with pytest.raises(UpstreamTimeout) as caught:
            await ask(client, stage.upstream(idle_timeout_ms=50))
        assert not isinstance(caught.value, DeadlinePassed)
        with pytest.raises(UpstreamTimeout):
            async with client.send(stage.upstream(idle_timeout_ms=50), "POST", "/", {}, b"{}") as answer:
                while await answer.read():
                    pass
        await stage.all_left()


async def test_an_answer_may_not_take_too_long_however_busy_it_is(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(STREAM)
        while True:
            await guest.say(b"1\r\nx\r\n")
            await asyncio.sleep(0.005)

    async with playing(part) as stage:
        upstream = stage.upstream(total_timeout_ms=100)
        with pytest.raises(DeadlinePassed):
            await ask(client, upstream)
        with pytest.raises(DeadlinePassed):
            async with client.send(upstream, "POST", "/", {}, b"{}") as answer:
                while await answer.read():
                    pass
        with contextlib.suppress(asyncio.CancelledError):
            for scene in stage.scenes:
                scene.cancel()
                await asyncio.wait((scene,))


async def test_a_limit_that_is_shorter_than_the_last_ones_holds(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(HERE)
        await guest.left()

    async with playing(part) as stage:
        assert await ask(client, stage.upstream()) == (200, b"here")
        with pytest.raises(UpstreamTimeout):
            await ask(client, stage.upstream(idle_timeout_ms=50))
        assert len(stage.guests) == 1


async def test_a_limit_does_not_run_from_one_request_into_the_next(client: UpstreamClient) -> None:
    """The next one begins when the last one's limit is nearly over."""

    async def part(guest: Guest) -> None:
        while True:
            await guest.request()
            await guest.say(OK + b"Content-Length: 4\r\n\r\n")
            await asyncio.sleep(0.12)
            await guest.say(b"here")

    async with playing(part) as stage:
        for _ in range(4):
            assert await ask(client, stage.upstream(idle_timeout_ms=200, total_timeout_ms=5000)) == (200, b"here")
        assert len(stage.guests) == 1


async def test_the_clock_stands_still_while_nobody_reads(client: UpstreamClient) -> None:
    read_on = asyncio.Event()

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(STREAM)
        await read_on.wait()
        await guest.say(REST)

    async with playing(part) as stage:
        upstream = stage.upstream(idle_timeout_ms=100)
        async with client.send(upstream, "POST", "/", {}, b"{}") as answer:
            assert await answer.read() == b"he"
            await asyncio.sleep(0.35)
            read_on.set()
            assert [piece async for piece in answer.chunks()] == [b"re"]


async def test_what_has_come_can_be_read_after_the_deadline_and_nothing_else(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(STREAM)
        await guest.left()

    async with playing(part) as stage:
        with pytest.raises(DeadlinePassed):
            async with client.send(stage.upstream(total_timeout_ms=100), "POST", "/", {}, b"{}") as answer:
                await asyncio.sleep(0.2)
                assert await answer.read() == b"he"
                await answer.read()
        await stage.all_left()
