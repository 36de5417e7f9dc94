"""Stores of several nodes, under the traffic of two gateways: slots move, primaries die with what they alone knew."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway.credits.keyspace import account_key, shard_keys, shard_of, slot_of
from tests.faults.bench import Books, Client, Customer, Place, Traffic, books_of, place, serving, until
from tests.faults.table import measured
from tests.faults.upstream import CountingUpstream
from tests.gateway_process import Gateway
from tests.servers import SlotMigration, ValkeyCluster, ValkeyServer, valkey_cluster, valkey_sentinels

pytestmark = pytest.mark.long


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    with valkey_cluster() as cluster:
        yield cluster


@asynccontextmanager
async def two_gateways(upstream: CountingUpstream, where: Place, directory: Path) -> AsyncIterator[list[Gateway]]:
    async with (
        serving(upstream, directory / "one", where) as one,
        serving(upstream, directory / "two", where) as two,
    ):
        yield [one, two]


async def customers_where(books: Books, count: int, wanted: Callable[[int], bool]) -> list[Customer]:
    """So many customers in slots that are wanted."""
    names = (f"customer-{number}" for number in itertools.count())
    mine = itertools.islice((name for name in names if wanted(slot_of(account_key(name)))), count)
    return [await books.customer(name) for name in mine]


def in_thread(step: Callable[..., None], *args: object) -> "asyncio.Future[None]":
    """A step of the harness, which blocks, while the traffic goes on."""
    return asyncio.ensure_future(asyncio.to_thread(step, *args))


async def test_a_slot_moves_under_a_gateways_traffic(
    cluster: ValkeyCluster, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    """Key by key, so that for a while some scripts have keys on two nodes: those wait, or are refused."""
    where = place(cluster.url, tmp_path)
    async with books_of(where) as books, two_gateways(upstream, where, tmp_path) as gateways:
        customers = await customers_where(books, 6, lambda _: True)
        slot = slot_of(account_key(customers[0].name))
        target = next(port for port in cluster.primaries if port != cluster.primary_of(slot))
        migration = SlotMigration(cluster, slot, target)
        traffic = Traffic(client, upstream, gateways)
        async with traffic.of(customers):
            await traffic.progress(30)
            await in_thread(migration.begin)
            await traffic.progress(10)
            for key in await asyncio.to_thread(migration.keys):
                await in_thread(migration.move, key)
                await asyncio.sleep(0.1)
            await in_thread(migration.finish)
            await traffic.progress(30)
        lost = await books.lost_nano(upstream, *customers)
        await books.verified()
    assert cluster.primary_of(slot) == target
    assert (lost, traffic.cut) == (0, 0)
    measured("slot moves", lost, "nano-credits", f"{traffic.answered} answers, {traffic.refused} were refused")


async def fail_over(
    books: Books,
    customers: list[Customer],
    traffic: Traffic,
    wait_taken_over: Callable[[], None],
    *,
    primary: ValkeyServer,
    replica: ValkeyServer,
) -> None:
    """Under traffic the replica gets nothing any more for a while, and then becomes the primary."""

    def entries() -> int:
        return sum(int(str(primary.command("HGET", account_key(one.name), "sequence"), "ascii")) for one in customers)

    async with traffic.of(customers):
        await traffic.progress(20)
        replica.pause()
        primary.command("CLIENT", "KILL", "TYPE", "replica")
        replicated = entries()
        # All of these reservations, extensions and settlements are on the primary alone; entries are of settlements.
        await until(lambda: entries() >= replicated + 20)
        primary.kill()
        replica.resume()
        await in_thread(wait_taken_over)
        await traffic.progress(20)


async def checked(books: Books, upstream: CountingUpstream, customers: list[Customer]) -> int:
    """The credits that are lost, once the gateways have said again what they had to."""

    async def all_said() -> bool:
        return await books.lost_nano(upstream, *customers) == 0

    with suppress(TimeoutError):
        await until(all_said)
    await books.verified()
    return await books.lost_nano(upstream, *customers)


async def test_settlements_that_a_replica_of_a_cluster_lacked_are_said_again(
    cluster: ValkeyCluster, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    where = place(cluster.url, tmp_path)
    async with (
        books_of(where) as books,
        two_gateways(upstream, where, tmp_path) as gateways,
    ):
        port = cluster.primary_of(0)
        customers = await customers_where(books, 6, lambda slot: cluster.primary_of(slot) == port)
        traffic = Traffic(client, upstream, gateways)
        await fail_over(
            books,
            customers,
            traffic,
            lambda: cluster.wait_taken_over(0, port),
            primary=cluster.node(port),
            replica=cluster.node(cluster.replica_of(0)),
        )
        lost = await checked(books, upstream, customers)
    assert lost == 0
    measured("cluster failover", lost, "nano-credits", f"{traffic.answered} answers, {traffic.refused} were refused")


async def test_settlements_that_a_replica_behind_sentinels_lacked_are_said_again(
    upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    with valkey_sentinels() as sentinels:
        where = place(sentinels.url, tmp_path)
        async with (
            books_of(where) as books,
            two_gateways(upstream, where, tmp_path) as gateways,
        ):
            port = sentinels.primary
            (replica,) = (one for one in sentinels._nodes if one != port)
            customers = await customers_where(books, 6, lambda _: True)
            traffic = Traffic(client, upstream, gateways)
            await fail_over(
                books,
                customers,
                traffic,
                lambda: sentinels.wait_taken_over(port),
                primary=sentinels.node(port),
                replica=sentinels.node(replica),
            )
            lost = await checked(books, upstream, customers)
    assert lost == 0
    measured("sentinel failover", lost, "nano-credits", f"{traffic.answered} answers, {traffic.refused} were refused")


async def test_after_a_failover_the_ledger_agrees_with_what_was_archived_before(
    cluster: ValkeyCluster, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    """Settlements are archived that the replica lacks, which then becomes the primary."""
    where = place(cluster.url, tmp_path)
    async with books_of(where) as books, serving(upstream, tmp_path / "data", where) as gateway:
        port = cluster.primary_of(0)
        (customer,) = await customers_where(books, 1, lambda slot: cluster.primary_of(slot) == port)
        primary, replica = cluster.node(port), cluster.node(cluster.replica_of(0))
        ledger = shard_keys(shard_of(customer.name)).ledger
        primary.command("WAIT", 1, 10_000)
        replica.pause()
        primary.command("CLIENT", "KILL", "TYPE", "replica")
        upstream.busy = True
        assert (await client.ask(gateway, customer)).status == 200
        await until(lambda: primary.command("XLEN", ledger) == 0)
        primary.kill()
        replica.resume()
        await in_thread(cluster.wait_taken_over, 0, port)
        assert await books.store.wait_connected(60)
        while (await client.ask(gateway, customer)).status != 200:
            await asyncio.sleep(0.1)
        await until(lambda: replica.command("XLEN", ledger) == 0)
        assert await books.lost_nano(upstream, customer) == 0
        await books.verified()
