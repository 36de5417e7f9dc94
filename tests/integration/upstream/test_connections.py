"""Connections to upstreams: how they are kept, given up and closed."""

import asyncio

import pytest

from gateway.config.model import Upstream
from gateway.upstream import pool
from gateway.upstream.client import UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import ask
from tests.upstreams.wire import HERE, STREAM, Guest, playing, say_here


async def test_connections_are_used_again(client: UpstreamClient) -> None:
    together = asyncio.Barrier(5)

    async def part(guest: Guest) -> None:
        while True:
            if (await guest.request()).lines[0].startswith("GET"):
                await together.wait()
            await guest.say(HERE)

    async with playing(part) as stage:
        for _ in range(3):
            assert await ask(client, stage.upstream()) == (200, b"here")
        assert len(stage.guests) == 1
        for _ in range(2):
            await asyncio.gather(*(ask(client, stage.upstream(), "GET") for _ in range(5)))
        assert len(stage.guests) == 5


async def test_an_idle_connection_is_closed_after_a_while(
    client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_KEEP_ALIVE_S", 0.05)
    async with playing(say_here) as stage:
        await asyncio.gather(*(ask(client, stage.upstream()) for _ in range(3)))
        await stage.all_left()
        assert await ask(client, stage.upstream()) == (200, b"here")
        await stage.all_left()
        assert len(stage.guests) == 4


async def test_a_connection_that_the_upstream_closed_is_not_used(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(HERE)
        await guest.hang_up()

    async with playing(part) as stage, playing(say_here) as other:
        for number in range(1, 4):
            assert await ask(client, stage.upstream()) == (200, b"here")
            await asyncio.gather(*stage.scenes)
            await ask(client, other.upstream())  # by whose answer the end of the other has been seen
            assert len(stage.guests) == number


async def test_what_comes_unasked_closes_an_idle_connection(client: UpstreamClient) -> None:
    idle = asyncio.Event()

    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(HERE)
        await idle.wait()
        await guest.say(HERE.replace(b"here", b"evil"))
        await guest.left()

    async with playing(part) as stage:
        assert await ask(client, stage.upstream()) == (200, b"here")
        idle.set()
        await stage.all_left()
        assert await ask(client, stage.upstream()) == (200, b"here")
        assert len(stage.guests) == 2


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
async def test_a_request_that_met_the_end_of_its_connection_is_repeated_only_if_it_changes_nothing(
    client: UpstreamClient, method: str
) -> None:
    requests = 0

    async def part(guest: Guest) -> None:
        nonlocal requests
        await guest.request()
        await guest.say(HERE)
        await guest.head()
        requests += 1
        await guest.hang_up()

    async with playing(part) as stage:
        await ask(client, stage.upstream())
        if method == "GET":
            assert await ask(client, stage.upstream(), "GET") == (200, b"here")
            assert (requests, len(stage.guests)) == (1, 2)
        else:
            with pytest.raises(UpstreamUnavailable):
                await ask(client, stage.upstream(), method)
            assert (requests, len(stage.guests)) == (1, 1)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["fresh", "interim answer"])
async def test_no_request_is_repeated_that_was_heard(client: UpstreamClient, said: bytes) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        if said:
            await guest.say(HERE)
            await guest.request()
            await guest.say(said)
        await guest.hang_up()

    async with playing(part) as stage:
        if said:
            await ask(client, stage.upstream())
        with pytest.raises(UpstreamUnavailable):
            await ask(client, stage.upstream(), "GET")
        assert len(stage.guests) == 1


# --- given up --------------------------------------------------------------------------------------------------------


async def test_leaving_early_tells_the_upstream(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(STREAM)
        await guest.left()

    async with playing(part) as stage:
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            assert answer.status == 200
        await stage.all_left()
        with pytest.raises(ZeroDivisionError):
            async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
                await answer.read()
                raise ZeroDivisionError
        await stage.all_left()
        assert len(stage.guests) == 2


async def test_who_waits_for_an_answer_that_is_given_up_is_told(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(STREAM)
        await guest.left()

    async with playing(part) as stage, client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
        assert await answer.read() == b"he"
        reading = asyncio.create_task(answer.read())
        asyncio.get_running_loop().call_soon(answer.abandon)
        with pytest.raises(UpstreamUnavailable, match="given up"):
            await reading
        await stage.all_left()


async def test_an_answer_that_is_whole_gives_up_no_connection(client: UpstreamClient) -> None:
    """It may be another one's by then."""
    async with playing(say_here) as stage:
        async with client.send(stage.upstream(), "POST", "/", {}, b"{}") as answer:
            assert await ask(client, stage.upstream()) == (200, b"here")
            answer.abandon()
            assert await ask(client, stage.upstream()) == (200, b"here")
        assert await ask(client, stage.upstream()) == (200, b"here")
        assert len(stage.guests) == 1


@pytest.mark.parametrize("moment", ["connecting", "asking", "in the middle"])
async def test_who_is_cancelled_leaves_no_connection(client: UpstreamClient, moment: str) -> None:
    reached = asyncio.Event()

    async def part(guest: Guest) -> None:
        if moment == "connecting":
            assert await guest.reader.read(1)
        else:
            await guest.request()
        if moment == "in the middle":
            await guest.say(STREAM)
        reached.set()
        await guest.left()

    async def read() -> None:
        async with client.send(upstream, "POST", "/", {}, b"{}") as answer:
            while await answer.read():
                pass

    async with playing(part) as stage:
        scheme = "https" if moment == "connecting" else "http"
        upstream = Upstream("test", f"{scheme}://127.0.0.1:{stage.port}/v1", None)
        reading = asyncio.create_task(read())
        await reached.wait()
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait((reading,))
        assert reading.cancelled()
        await stage.all_left()


async def test_closing_ends_all_that_is_under_way(client: UpstreamClient) -> None:
    begun = asyncio.Event()

    async def part(guest: Guest) -> None:
        if (await guest.request()).lines[0].startswith("GET"):
            begun.set()
            await guest.left()
        await guest.say(HERE)
        await guest.left()

    async with playing(part) as stage:
        await ask(client, stage.upstream())  # whose connection is idle
        running = asyncio.create_task(ask(client, Upstream("b", stage.upstream("localhost").base_url, None), "GET"))
        await begun.wait()
        await client.close()
        with pytest.raises(UpstreamUnavailable, match="closing"):
            await running
        await stage.all_left()
        with pytest.raises(UpstreamUnavailable, match="closing"):
            await ask(client, stage.upstream())


async def test_a_connection_that_is_closed_at_once_is_none(client: UpstreamClient) -> None:
    async with playing(Guest.hang_up) as stage:
        with pytest.raises(UpstreamUnavailable):
            await ask(client, stage.upstream())
        await client.close()
