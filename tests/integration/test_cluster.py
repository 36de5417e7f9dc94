"""The store on a real cluster: slots that move under load, primaries that die, and what a caller sees of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.credits.errors import StoreError, StoreUnavailable, StoreUnsuitable
from gateway.credits.keyspace import SHARDS, account_key, shard_keys, shard_of, slot_of
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS
from tests.exactly_once import Adds, accounts_in, add, adding_store
from tests.servers import SlotMigration, ValkeyCluster, free_port, in_thread, valkey_cluster, valkey_server
from tests.stores import started_store

SHARD = 0x2A
SLOT = slot_of(shard_keys(SHARD).records)


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[ValkeyCluster]:
    with valkey_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: ValkeyCluster) -> Iterator[ValkeyCluster]:
    """The module's cluster, all well and empty."""
    running_cluster.heal()
    for port in running_cluster.primaries:
        running_cluster.command(port, "FLUSHALL")
    yield running_cluster
    running_cluster.heal()


@pytest.fixture
async def store(cluster: ValkeyCluster, metrics: Metrics) -> AsyncIterator[Store]:
    async with adding_store(cluster.url, metrics) as store:
        yield store


def migration_of(cluster: ValkeyCluster, slot: int = SLOT) -> SlotMigration:
    source = cluster.primary_of(slot)
    return SlotMigration(cluster, slot, next(port for port in cluster.primaries if port != source))


def refusals(cluster: ValkeyCluster, code: str) -> int:
    """How many calls the nodes have answered with this error."""
    stats = [cluster.command(port, "INFO", "errorstats") for port in cluster.ports]
    return sum(stat.get(f"errorstat_{code}", {}).get("count", 0) for stat in stats)


# --- all is well ----------------------------------------------------------------------------------------------------


async def test_scripts_run_for_accounts_of_every_shard(cluster: ValkeyCluster, store: Store) -> None:
    accounts = [accounts_in(shard, 1)[0] for shard in range(SHARDS)]
    before = refusals(cluster, "MOVED")
    replies = await asyncio.gather(*(add(store, account, "op", 5) for account in accounts))
    assert replies == [(True, 5)] * SHARDS
    assert refusals(cluster, "MOVED") == before
    assert sorted(await store.scan("qg1:{*}:account:*")) == sorted(map(account_key, accounts))
    keys = [cluster.command(port, "DBSIZE") for port in cluster.primaries]
    assert sum(keys) == 5 * SHARDS + 1
    assert min(keys) > SHARDS


async def test_the_engine_works_on_a_cluster(cluster: ValkeyCluster, metrics: Metrics) -> None:
    async with started_store(cluster.url, metrics) as store:
        operator = Operator(store, PLANS, "standard")
        names = [f"customer-{i}" for i in range(20)]
        await asyncio.gather(*(operator.create_account(name) for name in names))
        await asyncio.gather(*(operator.credit(name, 7, "grant", f"op-{name}") for name in names))
        assert await operator.accounts() == sorted(names)
        assert {(await operator.funds(name)).balance_nano for name in names} == {7}
        assert await operator.reservations() == []


async def test_commands_without_a_key_go_to_any_primary(store: Store) -> None:
    assert await store.call("PING") == b"PONG"
    assert len(await store.call("TIME")) == 2
    assert (await store.settings())["appendonly"] == "yes"


async def test_a_key_that_the_map_is_not_asked_for_is_found_by_redirection(store: Store) -> None:
    await store.call("SET", "somebody else's", "x")
    assert await store.call("GET", "somebody else's") == b"x"


# --- slots that move ------------------------------------------------------------------------------------------------


async def test_a_slot_moves_key_by_key_under_load(cluster: ValkeyCluster, store: Store) -> None:
    """Every operation happens once, though at times the keys of one script lie on two nodes."""
    adds = Adds(store, accounts_in(SHARD, 30) + accounts_in(SHARD + 1, 3))
    migration = migration_of(cluster)
    before = {code: refusals(cluster, code) for code in ("MOVED", "ASK", "TRYAGAIN")}
    async with adds.load(workers=300):
        await adds.progress(1000)
        await in_thread(migration.begin)
        await adds.progress(300)
        for key in await asyncio.to_thread(migration.keys):
            await in_thread(migration.move, key)
            await asyncio.sleep(0.02)
        await adds.progress(300)
        await in_thread(migration.finish)
        await adds.progress(1000)
    await adds.check_each_happened_once()
    assert adds.repeated == 0
    assert cluster.primary_of(SLOT) == migration.target
    assert all(refusals(cluster, code) > count for code, count in before.items())


async def test_many_commands_at_once_are_answered_in_order_while_a_slot_moves(
    cluster: ValkeyCluster, store: Store
) -> None:
    streams = [shard_keys(shard).ledger for shard in range(SHARDS)]
    for number, stream in enumerate(streams):
        await store.call("XADD", stream, "*", "number", number)
    before = {code: refusals(cluster, code) for code in ("MOVED", "ASK")}
    migration = migration_of(cluster)
    await in_thread(migration.begin)
    await in_thread(migration.move, *await asyncio.to_thread(migration.keys))
    found = await store.call_all([("XRANGE", stream, "-", "+") for stream in streams])
    assert [int(words[1]) for [(_, words)] in found] == list(range(SHARDS))
    await in_thread(migration.finish)
    assert await store.call_all([("XLEN", stream) for stream in streams]) == [1] * SHARDS
    assert all(refusals(cluster, code) > count for code, count in before.items())


async def test_a_script_with_keys_on_two_nodes_waits_and_is_then_refused(
    cluster: ValkeyCluster, metrics: Metrics
) -> None:
    (account,) = accounts_in(SHARD, 1)
    async with adding_store(cluster.url, metrics, 300) as store:
        await add(store, account, "before", 1)
        migration = migration_of(cluster)
        migration.begin()
        migration.move(account_key(account))
        with pytest.raises(StoreUnavailable, match="TRYAGAIN"):
            await add(store, account, "meanwhile", 1)
        waiting = asyncio.create_task(add(store, account, "meanwhile", 1))
        await asyncio.sleep(0.02)
        migration.move(*migration.keys())
        assert await waiting == (True, 2)
        migration.finish()
        assert await add(store, account, "after", 1) == (True, 3)


async def test_asked_keys_are_found_among_others(cluster: ValkeyCluster, store: Store) -> None:
    """ASKING and the command stay together though hundreds of calls share the connection."""
    moved, others = accounts_in(SHARD, 20), [accounts_in(shard, 1)[0] for shard in range(0, SHARDS, 4)]
    await asyncio.gather(*(add(store, account, "before", 1) for account in moved))
    migration = migration_of(cluster)
    migration.begin()
    migration.move(*migration.keys())
    for round_ in range(5):
        await asyncio.gather(*(add(store, account, f"{round_}", 1) for account in [*moved, *others]))
    # The target has forgotten the script: EVAL has to come after ASKING too.
    cluster.command(migration.target, "SCRIPT", "FLUSH")
    assert await add(store, moved[0], "flushed", 1) == (True, 7)
    assert refusals(cluster, "NOSCRIPT") > 0
    migration.finish()
    assert await add(store, moved[1], "after", 1) == (True, 7)


async def test_after_a_slot_moved_it_is_known_where_it_is(cluster: ValkeyCluster, store: Store) -> None:
    (account,) = accounts_in(SHARD, 1)
    await add(store, account, "before", 1)
    before = refusals(cluster, "MOVED")
    migration = migration_of(cluster)
    migration.complete()
    assert await add(store, account, "first", 1) == (True, 2)
    told = refusals(cluster, "MOVED")
    assert told == before + 1
    await asyncio.gather(*(add(store, account, f"{i}", 1) for i in range(50)))
    assert refusals(cluster, "MOVED") == told


# --- primaries that go ----------------------------------------------------------------------------------------------


async def test_a_primary_is_killed_under_load(cluster: ValkeyCluster, metrics: Metrics) -> None:
    """What was answered and not yet replicated may be lost, so everything is said again: it still counts once."""
    failovers: list[None] = []
    async with adding_store(cluster.url, metrics, 1000) as store:
        store.on_failover = lambda: failovers.append(None)
        adds = Adds(store, accounts_in(SHARD, 5) + [accounts_in(shard, 1)[0] for shard in range(10)])
        async with adds.load(workers=200):
            await adds.progress(1000)
            killed = cluster.kill_primary_of(SLOT)
            await in_thread(cluster.wait_taken_over, SLOT, killed)
            await adds.progress(3000)
        await adds.repeat_all()
        await adds.check_each_happened_once()
        assert adds.unavailable > 0
        assert await store.wait_connected(20)
        assert failovers


async def test_a_primary_that_hangs_is_replaced(cluster: ValkeyCluster, metrics: Metrics) -> None:
    async with adding_store(cluster.url, metrics, 300) as store:
        adds = Adds(store, accounts_in(SHARD, 5))
        hung = cluster.primary_of(SLOT)
        async with adds.load(workers=20):
            await adds.progress(100)
            cluster.node(hung).pause()
            try:
                # The harness would hang too if it asked the one that does.
                await adds.progress(500)
            finally:
                cluster.node(hung).resume()
            await adds.progress(500)
        await adds.repeat_all()
        await adds.check_each_happened_once()


async def test_an_orderly_change_of_primary_loses_nothing(cluster: ValkeyCluster, store: Store) -> None:
    failovers: list[None] = []
    store.on_failover = lambda: failovers.append(None)
    adds = Adds(store, accounts_in(SHARD, 5) + [accounts_in(shard, 1)[0] for shard in range(10)])
    async with adds.load(workers=200):
        await adds.progress(1000)
        await in_thread(cluster.hand_over, SLOT)
        await adds.progress(2000)
    await adds.check_each_happened_once()
    assert failovers


async def test_moving_a_slot_between_primaries_is_no_failover(cluster: ValkeyCluster, store: Store) -> None:
    failovers: list[None] = []
    store.on_failover = lambda: failovers.append(None)
    (account,) = accounts_in(SHARD, 1)
    migration = migration_of(cluster)
    migration.complete()
    assert await add(store, account, "op", 1) == (True, 1)
    assert await store.wait_connected(20)
    assert not failovers


async def test_a_part_without_any_node_is_unavailable_until_it_is_back(
    cluster: ValkeyCluster, metrics: Metrics
) -> None:
    (account,) = accounts_in(SHARD, 1)
    async with adding_store(cluster.url, metrics, 500) as store:
        await add(store, account, "before", 1)
        replica = cluster.replica_of(SLOT)
        cluster.kill_primary_of(SLOT)
        cluster.node(replica).kill()
        for i in range(20):
            with pytest.raises(StoreUnavailable):
                await add(store, account, f"lost {i}", 1)
        await in_thread(cluster.heal)
        assert await store.wait_connected(20)
        assert await add(store, account, "after", 1) == (True, 2)


# --- URLs and settings ----------------------------------------------------------------------------------------------


async def refusal_of(url: str, metrics: Metrics) -> str:
    """Why a store with this URL does not start."""
    with pytest.raises(StoreError) as caught:
        async with adding_store(url, metrics):
            pass
    return str(caught.value)


async def test_a_wrong_url_gets_a_clear_error(cluster: ValkeyCluster, metrics: Metrics) -> None:
    with valkey_server(port=(port := free_port())):
        assert "is no node of a cluster: use a redis:// URL" in await refusal_of(
            f"redis+cluster://127.0.0.1:{port}", metrics
        )
        assert "is no sentinel" in await refusal_of(f"redis+sentinel://127.0.0.1:{port}/credits", metrics)
    assert "use a redis+cluster:// URL" in await refusal_of(f"redis://127.0.0.1:{cluster.ports[0]}", metrics)
    assert "cannot reach the store" in await refusal_of(f"redis+cluster://127.0.0.1:{free_port()}", metrics)
    assert "HOST:PORT" in await refusal_of("redis+cluster://127.0.0.1:7000,,other", metrics)
    assert "only database 0" in await refusal_of("redis+cluster://127.0.0.1:7000/3", metrics)
    assert "max_connections" in await refusal_of("redis+cluster://127.0.0.1:7000?max_connections=5", metrics)


async def test_one_node_that_answers_is_enough(cluster: ValkeyCluster, metrics: Metrics) -> None:
    dead = ",".join(f"127.0.0.1:{free_port()}" for _ in range(2))
    async with adding_store(f"redis+cluster://{dead},127.0.0.1:{cluster.ports[-1]}", metrics) as store:
        assert await add(store, accounts_in(SHARD, 1)[0], "op", 1) == (True, 1)


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        (["appendonly no"], ["appendonly yes"], "set appendonly yes"),
        (
            ["maxmemory 1gb", "maxmemory-policy allkeys-lru"],
            ["maxmemory 0", "maxmemory-policy noeviction"],
            "set maxmemory-policy noeviction",
        ),
    ],
)
async def test_one_primary_that_would_lose_credits_is_enough_to_refuse(
    cluster: ValkeyCluster, metrics: Metrics, wrong: list[str], right: list[str], message: str
) -> None:
    port = cluster.primaries[2]
    try:
        for setting in wrong:
            cluster.command(port, "CONFIG", "SET", *setting.split())
        with pytest.raises(StoreUnsuitable, match=message):
            async with adding_store(cluster.url, metrics):
                pass
        async with adding_store(cluster.url, metrics, allow_unsafe=True) as store:
            shown = await store.settings()
            assert any("/" in value for value in shown.values()), shown
    finally:
        for setting in right:
            cluster.command(port, "CONFIG", "SET", *setting.split())


def test_a_shard_has_one_slot() -> None:
    for shard in range(SHARDS):
        account = accounts_in(shard, 1)[0]
        assert shard_of(account) == shard
        assert {slot_of(key) for key in (account_key(account), *shard_keys(shard))} == {
            slot_of(shard_keys(shard).records)
        }


def test_slots_are_spread_over_the_cluster() -> None:
    thirds = Counter(slot_of(shard_keys(shard).records) * 3 // 16_384 for shard in range(SHARDS))
    assert min(thirds.values()) > SHARDS // 5
