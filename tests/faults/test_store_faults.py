"""The store dies, hangs, is full, forgets its scripts; or the gateway's own disk is full meanwhile."""

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway.credits.embedded import running_url
from tests.faults.bench import Books, Client, Customer, Place, Talk, Traffic, books_of, place, serving, until
from tests.faults.store_proxy import StoreProxy
from tests.faults.table import measured
from tests.faults.upstream import CountingUpstream, Exchange
from tests.gateway_process import Gateway
from tests.servers import ValkeyServer, valkey_server

WHOLE_TOKENS = 500


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A store of the test's own, with ``appendfsync everysec``."""
    with valkey_server("--appendfsync", "everysec") as server:
        yield server


class InFlight:
    """A stream that has shown some output, and a whole answer that is still to come, each of its own customer."""

    def __init__(self, customers: list[Customer]) -> None:
        self.streamed, self.whole = customers
        self._talks: list[tuple[Talk, Exchange]] = []

    async def begin(self, client: Client, gateway: Gateway, upstream: CountingUpstream) -> None:
        for customer, stream in ((self.streamed, True), (self.whole, False)):
            talk, _ = client.begin(gateway, customer, stream=stream)
            self._talks.append((talk, await upstream.next()))
        talk, exchange = self._talks[0]
        await exchange.headers()
        await exchange.emit(50)
        await until(lambda: talk.tokens == 50)

    async def go_on(self) -> None:
        """The stream shows more."""
        talk, exchange = self._talks[0]
        await exchange.emit(50)
        await until(lambda: talk.tokens == 100)

    async def end(self) -> None:
        """Both come to their end; the client must get all of it."""
        (streamed, stream), (whole, answer) = self._talks
        await stream.finish()
        await stream.done()
        await answer.answer(WHOLE_TOKENS)
        await until(lambda: streamed.complete and whole.complete)
        assert (streamed.status, whole.status) == (200, 200)


async def in_flight(books: Books, client: Client, gateway: Gateway, upstream: CountingUpstream) -> InFlight:
    flight = InFlight([await books.customer(name) for name in ("streamed", "whole")])
    await flight.begin(client, gateway, upstream)
    return flight


async def refused(client: Client, gateway: Gateway, customer: Customer, upstream: CountingUpstream) -> None:
    """A request that must not be forwarded."""
    before = len(upstream.exchanges)
    talk = await client.ask(gateway, customer)
    assert (talk.status, talk.code) == (503, "quota_store_unavailable")
    assert len(upstream.exchanges) == before


async def settled_once(books: Books, upstream: CountingUpstream, *customers: Customer) -> int:
    """What is lost, in nano-credits, once all is settled; every customer was to be charged once."""
    lost = await books.lost_nano(upstream, *customers)
    for customer in customers:
        assert await books.charges(customer) == ["settle"]
    await books.verified()
    return lost


def in_journal(data_dir: Path) -> int:
    """Settlements that wait in the gateway's journal."""
    return sum(path.read_text().count('"verb":"settle"') for path in (data_dir / "journal").glob("*.journal"))


async def test_a_store_killed_mid_stream_and_while_settling_loses_nothing(
    server: ValkeyServer, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    """One settlement has just run, and its reply is lost with the store; two others are due while it is away."""
    where = place(server.url, tmp_path)
    async with (
        books_of(where) as books,
        StoreProxy(server.url) as proxy,
        serving(upstream, tmp_path, where.by_way_of(proxy.url)) as gateway,
    ):
        settling = await books.customer("settling")
        flight = await in_flight(books, client, gateway, upstream)
        talk, _ = client.begin(gateway, settling)
        trap = proxy.catch("settle", "after", cut=True)
        await (await upstream.next()).answer(WHOLE_TOKENS)
        await trap.caught()
        server.kill()
        await flight.go_on()
        await flight.end()
        await until(lambda: talk.complete)
        await refused(client, gateway, settling, upstream)
        server.start()
        lost = await settled_once(books, upstream, settling, flight.streamed, flight.whole)
    assert lost == 0
    measured("store killed", lost, "nano-credits", "3 settlements")


@pytest.mark.long
async def test_an_embedded_store_killed_mid_stream_loses_nothing(
    upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    async with serving(upstream, tmp_path) as gateway:
        url = running_url(tmp_path)
        assert url is not None
        async with books_of(Place(url, f"sqlite:///{tmp_path}/ledger.sqlite3")) as books:
            flight = await in_flight(books, client, gateway, upstream)
            os.kill(pid_of(url), signal.SIGKILL)
            await flight.go_on()
            await flight.end()
            lost = await settled_once(books, upstream, flight.streamed, flight.whole)
    assert lost == 0
    measured("embedded store killed", lost, "nano-credits", "2 settlements")


def pid_of(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


@pytest.mark.long
async def test_a_store_that_hangs_gets_its_settlements_once(
    server: ValkeyServer, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    """What it was sent before it hung runs when it goes on, and so does what is repeated: it counts once."""
    where = place(server.url, tmp_path)
    async with books_of(where) as books, serving(upstream, tmp_path / "data", where) as gateway:
        flight = await in_flight(books, client, gateway, upstream)
        server.pause()
        await flight.go_on()
        await flight.end()
        assert in_journal(tmp_path / "data") == 2
        await refused(client, gateway, flight.whole, upstream)
        await refused(client, gateway, flight.streamed, upstream)
        server.resume()
        lost = await settled_once(books, upstream, flight.streamed, flight.whole)
        await until(lambda: in_journal(tmp_path / "data") == 0)
    assert lost == 0
    measured("store hangs", lost, "nano-credits", "2 settlements")


@pytest.mark.long
async def test_settlements_that_the_journal_has_no_room_for_wait_in_memory(
    server: ValkeyServer, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    where = place(server.url, tmp_path)
    async with books_of(where) as books, serving(upstream, tmp_path / "data", where) as gateway:
        flight = await in_flight(books, client, gateway, upstream)
        limits = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE)
        server.kill()
        # No file of the gateway's can grow: writing is refused as on a full disk.
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        await flight.go_on()
        await flight.end()
        assert in_journal(tmp_path / "data") == 0
        async with client.session.get(f"{gateway.admin_url}/metrics") as response:
            assert "quota_gateway_journal_failures_total 2.0" in await response.text()
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, limits)
        server.start()
        lost = await settled_once(books, upstream, flight.streamed, flight.whole)
    assert lost == 0
    measured("disk full", lost, "nano-credits", "2 settlements")


@pytest.mark.long
async def test_a_store_without_memory_admits_nothing_and_gets_its_settlements_later(
    server: ValkeyServer, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    where = place(server.url, tmp_path)
    async with books_of(where) as books, serving(upstream, tmp_path / "data", where) as gateway:
        flight = await in_flight(books, client, gateway, upstream)
        server.command("CONFIG", "SET", "maxmemory", 1, "maxmemory-policy", "noeviction")
        await flight.go_on()
        await flight.end()
        assert in_journal(tmp_path / "data") == 2
        await asyncio.gather(*(refused(client, gateway, flight.whole, upstream) for _ in range(10)))
        assert len(await books.open(flight.streamed)) == len(await books.open(flight.whole)) == 1
        server.command("CONFIG", "SET", "maxmemory", 0)
        lost = await settled_once(books, upstream, flight.streamed, flight.whole)
    assert lost == 0
    measured("store out of memory", lost, "nano-credits", "2 settlements")


@pytest.mark.long
async def test_scripts_flushed_under_traffic_are_sent_again(
    server: ValkeyServer, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    where = place(server.url, tmp_path)
    async with books_of(where) as books, serving(upstream, tmp_path / "data", where) as gateway:
        customers = [await books.customer(f"customer-{number}") for number in range(8)]
        traffic = Traffic(client, upstream, [gateway])
        async with traffic.of(customers):
            for _ in range(10):
                server.command("SCRIPT", "FLUSH")
                await traffic.progress(10)
        lost = await books.lost_nano(upstream, *customers)
        await books.verified()
    assert (lost, traffic.refused, traffic.cut) == (0, 0, 0)
    measured("scripts flushed", lost, "nano-credits", f"{traffic.answered} answers")
