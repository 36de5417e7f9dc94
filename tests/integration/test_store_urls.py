"""Stores of one's own: over TCP, over TLS, with a password; and those that would lose credits are refused."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS
from tests.servers import free_port, valkey_server


async def balance_after_grant(url: str, metrics: Metrics) -> int:
    store = Store(url, 5000, metrics)
    try:
        await store.start()
        operator = Operator(store, PLANS, "standard")
        await operator.create_account("acme")
        await operator.credit("acme", 7, "grant")
        return (await operator.funds("acme")).balance_nano
    finally:
        await store.close()


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


async def test_an_evicting_store_is_refused_unless_told_otherwise(metrics: Metrics) -> None:
    with valkey_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as server:
        store = Store(server.url, 5000, metrics)
        with pytest.raises(StoreUnsuitable, match="maxmemory-policy noeviction"):
            await store.start()
        await store.close()
        store = Store(server.url, 5000, metrics, allow_unsafe=True)
        await store.start()
        await store.close()


async def test_an_option_without_effect_is_refused(metrics: Metrics) -> None:
    with pytest.raises(StoreError, match="max_connections"):
        await balance_after_grant("redis://127.0.0.1:1?max_connections=5", metrics)
