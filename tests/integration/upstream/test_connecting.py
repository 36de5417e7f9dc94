"""Connections to upstreams: how they are opened."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.config.model import Upstream
from gateway.upstream import pool
from gateway.upstream.client import UpstreamClient, UpstreamUnavailable
from tests.integration.upstream.conftest import ask
from tests.upstreams.wire import HERE, OK, Guest, playing, say_here


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_an_upstream_may_have_an_ipv6_address(client: UpstreamClient) -> None:
    async def part(guest: Guest) -> None:
        assert (await guest.request()).header("Host") == [f"[::1]:{stage.port}"]
        await guest.say(HERE)

    async with playing(part, host="::1") as stage:
        assert await ask(client, stage.upstream("[::1]")) == (200, b"here")


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
        assert await ask(client, stage.upstream(NAME)) == (200, b"here")


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
        assert await second == (200, b"here")
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
        assert await ask(client, stage.upstream()) == (200, b"here")


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
