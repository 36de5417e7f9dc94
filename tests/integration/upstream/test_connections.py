"""Connections to upstreams: how they are opened, kept, timed, given up and closed."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.config.model import Upstream
from gateway.upstream import pool
from gateway.upstream.client import DeadlinePassed, UpstreamClient, UpstreamTimeout, UpstreamUnavailable
from tests.upstreams.wire import Guest, playing

OK = b"HTTP/1.1 200 OK\r\n"
HERE = OK + b"Content-Length: 4\r\n\r\nhere"
STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n"
REST = b"2\r\nre\r\n0\r\n\r\n"


async def say_here(guest: Guest) -> None:
    while True:
        await guest.request()
        await guest.say(HERE)


async def ask(client: UpstreamClient, upstream: Upstream, method: str = "POST") -> bytes:
    async with client.send(upstream, method, "/chat", {}, b"{}" if method == "POST" else None) as answer:
        return await answer.body(1000)


# --- kept ------------------------------------------------------------------------------------------------------------


async def test_connections_are_used_again(client: UpstreamClient) -> None:
    together = asyncio.Barrier(5)

    async def part(guest: Guest) -> None:
        while True:
            if (await guest.request()).lines[0].startswith("GET"):
                await together.wait()
            await guest.say(HERE)

    async with playing(part) as stage:
        for _ in range(3):
            assert await ask(client, stage.upstream()) == b"here"
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
        assert await ask(client, stage.upstream()) == b"here"
        await stage.all_left()
        assert len(stage.guests) == 4


async def test_a_connection_that_the_upstream_closed_is_not_used(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.request()
        await guest.say(HERE)
        await guest.hang_up()

    async with playing(part) as stage, playing(say_here) as other:
        for number in range(1, 4):
            assert await ask(client, stage.upstream()) == b"here"
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
        assert await ask(client, stage.upstream()) == b"here"
        idle.set()
        await stage.all_left()
        assert await ask(client, stage.upstream()) == b"here"
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
            assert await ask(client, stage.upstream(), "GET") == b"here"
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


# --- opened ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_an_upstream_may_have_an_ipv6_address(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        assert (await guest.request()).header("Host") == [f"[::1]:{stage.port}"]
        await guest.say(HERE)

    async with playing(part, host="::1") as stage:
        assert await ask(client, stage.upstream("[::1]")) == b"here"


NAME = "upstream.test"
Lookup = Callable[[], Awaitable[list[str]]]


@pytest.fixture
async def answer_lookups(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lookup], None]:
    """Let the addresses of NAME be what a function says."""
    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    def answer(lookup: Lookup) -> None:
        async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
            if host != NAME:
                return await real(host, port, **options)
            family, kind = socket.AF_INET, socket.SOCK_STREAM
            return [(family, kind, socket.IPPROTO_TCP, "", (address, port)) for address in await lookup()]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)

    return answer


async def test_all_addresses_of_a_host_are_tried(
    client: UpstreamClient, answer_lookups: Callable[[Lookup], None]
) -> None:
    async def lookup() -> list[str]:
        return ["127.0.0.2", "127.0.0.3", "127.0.0.1"]

    answer_lookups(lookup)
    async with playing(say_here) as stage:
        assert await ask(client, stage.upstream(NAME)) == b"here"


async def test_a_name_is_looked_up_once_for_many_connections(
    client: UpstreamClient, answer_lookups: Callable[[Lookup], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = 0

    async def lookup() -> list[str]:
        nonlocal lookups
        lookups += 1
        return ["127.0.0.1"]

    answer_lookups(lookup)
    async with playing(say_here) as stage:
        await asyncio.gather(*(ask(client, stage.upstream(NAME)) for _ in range(5)))
        assert (lookups, len(stage.guests)) == (1, 5)
        monkeypatch.setattr(pool, "_LOOKUP_S", -1.0)  # what is known is old by now
        await asyncio.gather(*(ask(client, stage.upstream(NAME)) for _ in range(6)))
        assert (lookups, len(stage.guests)) == (2, 6)


async def test_who_leaves_a_lookup_does_not_end_it_for_others(
    client: UpstreamClient, answer_lookups: Callable[[Lookup], None]
) -> None:
    looking, found = asyncio.Event(), asyncio.Event()

    async def lookup() -> list[str]:
        looking.set()
        await found.wait()
        return ["127.0.0.1"]

    answer_lookups(lookup)
    async with playing(say_here) as stage:
        first, second = (asyncio.create_task(ask(client, stage.upstream(NAME))) for _ in range(2))
        await looking.wait()
        first.cancel()
        await asyncio.wait((first,))
        found.set()
        assert await second == b"here"
        assert first.cancelled()


async def test_a_name_that_is_unknown_is_unavailable_and_asked_for_again(
    client: UpstreamClient, answer_lookups: Callable[[Lookup], None]
) -> None:
    lookups = 0

    async def lookup() -> list[str]:
        nonlocal lookups
        lookups += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    answer_lookups(lookup)
    with pytest.raises(UpstreamUnavailable, match="not known"):
        await ask(client, Upstream("test", f"http://{NAME}/v1", None))
    assert lookups == 2


async def test_a_name_that_nobody_answers_for_is_given_up(
    client: UpstreamClient, answer_lookups: Callable[[Lookup], None]
) -> None:
    async def lookup() -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    answer_lookups(lookup)
    with pytest.raises(UpstreamUnavailable, match="too long"):
        await ask(client, Upstream("test", f"http://{NAME}/v1", None, connect_timeout_ms=50))


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ssl.SSLContext]:
    """A server's TLS with a certificate for a name, of an authority that the system knows."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    def context(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["h2", "http/1.1"])
        authority.issue_cert(name).configure_cert(context)
        return context

    return context


async def test_tls_is_spoken_and_its_connections_are_kept(
    client: UpstreamClient, certified: Callable[[str], ssl.SSLContext]
) -> None:
    context, named = certified("localhost"), []
    context.sni_callback = lambda _, name, __: named.append(name)

    async def part(guest: Guest) -> None:
        assert guest.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        while True:
            request = await guest.request()
            await guest.say(OK + b"Content-Length: %d\r\n\r\n" % len(request.body), request.body)

    async with playing(part, tls=context) as stage:
        for size in (2, 100_000, 5_000_000):
            async with client.send(stage.upstream("localhost"), "POST", "/", {}, b"x" * size) as answer:
                assert len(await answer.body(2**23)) == size
        assert named == ["localhost"]
        assert len(stage.guests) == 1
        await client.close()
        await stage.all_left()


async def test_a_certificate_for_an_address_is_taken(
    client: UpstreamClient, certified: Callable[[str], ssl.SSLContext]
) -> None:
    async with playing(say_here, tls=certified("127.0.0.1")) as stage:
        assert await ask(client, stage.upstream()) == b"here"


async def test_another_ones_certificate_is_not_taken(
    client: UpstreamClient, certified: Callable[[str], ssl.SSLContext]
) -> None:
    async with playing(say_here, tls=certified("elsewhere.test")) as stage:
        with pytest.raises(UpstreamUnavailable, match="certificate"):
            await ask(client, stage.upstream("localhost"))


async def test_a_certificate_of_an_unknown_authority_is_not_taken(client: UpstreamClient) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    async with playing(say_here, tls=context) as stage:
        with pytest.raises(UpstreamUnavailable, match="certificate"):
            await ask(client, stage.upstream("localhost"))


async def test_a_server_without_tls_is_unavailable(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        await guest.say(b"what?")
        await guest.left()

    async with playing(part) as stage:
        upstream = Upstream("test", f"https://127.0.0.1:{stage.port}/v1", None)
        with pytest.raises(UpstreamUnavailable):
            await ask(client, upstream)
        await stage.all_left()


# --- timed -----------------------------------------------------------------------------------------------------------


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
        assert await ask(client, stage.upstream()) == b"here"
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
            assert await ask(client, stage.upstream(idle_timeout_ms=200, total_timeout_ms=5000)) == b"here"
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
            assert await ask(client, stage.upstream()) == b"here"
            answer.abandon()
            assert await ask(client, stage.upstream()) == b"here"
        assert await ask(client, stage.upstream()) == b"here"
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
