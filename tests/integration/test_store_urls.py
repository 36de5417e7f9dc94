"""Stores of one's own: over TCP, over TLS, with a password; and those that would lose credits are refused."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from gateway.config.document import Text
from gateway.config.fields import store_url
from gateway.credits.addresses import read_url
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS
from tests.exactly_once import add, adding_store
from tests.servers import free_port, valkey_server
from tests.stores import started_store


def checked(url: str) -> str:
    """What the configuration makes of a URL."""
    return store_url(Text(url, url))


async def balance_after_grant(url: str, metrics: Metrics) -> int:
    async with started_store(url, metrics) as store:
        operator = Operator(store, PLANS, "standard")
        await operator.create_account("acme")
        await operator.credit("acme", 7, "grant")
        return (await operator.funds("acme")).balance_nano


async def repeated_until_answered(store: Store) -> tuple[bool, int]:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreUnavailable):
                return await add(store, "acme", "first", 1)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def tls_in_front_of(port: int, certificate: trustme.LeafCert) -> AsyncIterator[int]:
    """A TLS listener that passes everything on, because the embedded server binary is built without TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def test_tcp_with_a_password_and_a_database(metrics: Metrics) -> None:
    port = free_port()
    with valkey_server(port=port, password="p@ss word"):
        assert await balance_after_grant(f"redis://:p%40ss%20word@127.0.0.1:{port}/3", metrics) == 7
        with pytest.raises(StoreRefused, match="WRONGPASS"):
            await balance_after_grant(f"redis://:wrong@127.0.0.1:{port}/3", metrics)


async def test_tls_is_verified(metrics: Metrics, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    port = free_port()
    with valkey_server(port=port):
        async with tls_in_front_of(port, authority.issue_cert("localhost")) as tls_port:
            url = f"rediss://localhost:{tls_port}"
            assert await balance_after_grant(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}", metrics) == 7
            with pytest.raises(StoreUnavailable, match="certificate"):
                await balance_after_grant(url, metrics)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy noeviction"),
        (("--appendonly", "no"), "set appendonly yes"),
    ],
    ids=["evicting", "not-on-disk"],
)
async def test_a_store_that_would_lose_credits_is_refused_unless_told_otherwise(
    metrics: Metrics, options: tuple[str, ...], remedy: str
) -> None:
    with valkey_server(*options) as server:
        with pytest.raises(StoreUnsuitable, match=remedy):
            async with started_store(server.url, metrics):
                pass
        async with started_store(server.url, metrics, allow_unsafe=True):
            pass


async def test_a_replica_is_refused(metrics: Metrics) -> None:
    with valkey_server() as server:
        server.command("REPLICAOF", "127.0.0.1", free_port())
        with pytest.raises(StoreUnavailable, match="is a replica"):
            async with started_store(server.url, metrics):
                pass


async def test_a_server_that_becomes_a_replica_is_given_up_until_it_is_a_primary(metrics: Metrics) -> None:
    """Its connections stay open; only its refusal to write tells."""
    with valkey_server() as server:
        async with adding_store(server.url, metrics, 500) as store:
            server.command("REPLICAOF", "127.0.0.1", free_port())
            with pytest.raises(StoreUnavailable):
                await add(store, "acme", "first", 1)
            assert not await store.wait_connected(0)
            server.command("REPLICAOF", "NO", "ONE")
            assert await store.wait_connected(20)
            assert await add(store, "acme", "second", 1) == (True, 1)


async def test_a_server_that_was_started_again_is_reported(metrics: Metrics) -> None:
    with valkey_server() as server:
        async with adding_store(server.url, metrics) as store:
            failovers: list[None] = []
            store.on_failover = lambda: failovers.append(None)
            assert await add(store, "acme", "first", 1) == (True, 1)
            server.kill()
            server.start()
            assert await repeated_until_answered(store) == (False, 1)
            assert len(failovers) == 1


async def test_an_option_without_effect_is_refused(metrics: Metrics) -> None:
    with pytest.raises(StoreError, match="max_connections"):
        await balance_after_grant("redis://127.0.0.1:1?max_connections=5", metrics)


@pytest.mark.parametrize(
    ("url", "addresses", "primary_name", "database"),
    [
        ("redis+cluster://a,b:7001", [("a", 6379), ("b", 7001)], "", 0),
        ("rediss+cluster://u:p%40ss@[::1]:7000/?ssl_ca_certs=/ca.pem", [("::1", 7000)], "", 0),
        ("redis+cluster://a:7000/0", [("a", 7000)], "", 0),
        ("redis+sentinel://a,b:1/my%20primary", [("a", 26379), ("b", 1)], "my primary", 0),
        ("rediss+sentinel://:s%2Cc@a:1,b:2,c:3/credits/4", [("a", 1), ("b", 2), ("c", 3)], "credits", 4),
    ],
)
def test_urls_of_many_servers(url: str, addresses: list[tuple[str, int]], primary_name: str, database: int) -> None:
    assert checked(url) == url
    where = read_url(url)
    assert list(where.addresses) == addresses
    assert (where.primary_name, where.endpoint.database) == (primary_name, database)
    assert where.endpoint.tls == url.startswith("rediss")
    assert "p@ss" not in repr(where)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://a,,b",
        "redis+cluster://a:x",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis+sentinel://a/",
        "redis+sentinel:///credits",
        "mysql+cluster://a",
    ],
)
def test_urls_that_the_configuration_refuses_are_refused_here_too(url: str) -> None:
    with pytest.raises(ValueError, match="must"):
        checked(url)
    with pytest.raises(StoreUnsuitable, match=r"store\.url"):
        read_url(url)
