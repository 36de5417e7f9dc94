"""The store behind real sentinels: the primary changes, in an orderly way or not, and nothing counts twice."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.credits.addresses import read_url
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.operator import Operator
from gateway.credits.sentinel import SentinelLocator
from gateway.credits.topology import Opener
from gateway.telemetry.metrics import Metrics
from tests.conftest import PLANS
from tests.exactly_once import Adds, accounts_in, add, adding_store
from tests.servers import (
    LoneSentinel,
    ValkeySentinels,
    free_port,
    free_ports,
    in_thread,
    valkey_sentinels,
    valkey_server,
)
from tests.stores import started_store

ACCOUNT = accounts_in(7, 1)[0]


@pytest.fixture
def sentinels() -> Iterator[ValkeySentinels]:
    """New ones for every test: after a failover it takes them many seconds to be ready for the next."""
    with valkey_sentinels() as sentinels:
        yield sentinels


async def test_the_primary_is_killed_under_load(sentinels: ValkeySentinels, metrics: Metrics) -> None:
    """What was answered and not yet replicated may be lost, so everything is said again: it still counts once."""
    failovers: list[None] = []
    async with adding_store(sentinels.url, metrics, 1000) as store:
        store.on_failover = lambda: failovers.append(None)
        adds = Adds(store, [accounts_in(shard, 1)[0] for shard in range(10)])
        async with adds.load(workers=100):
            await adds.progress(500)
            killed = sentinels.kill_primary()
            await in_thread(sentinels.wait_taken_over, killed)
            await adds.progress(1000)
        await adds.repeat_all()
        await adds.check_each_happened_once()
        assert adds.unavailable > 0
        assert len(failovers) == 1


async def test_a_grant_that_no_replica_has_yet_says_so(
    sentinels: ValkeySentinels, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async with started_store(sentinels.url, metrics, 2000) as store:
        operator = Operator(store, PLANS, "standard")
        await operator.create_account(ACCOUNT)
        await operator.credit(ACCOUNT, 5, "grant")
        assert "no replica" not in caplog.text
        replica = sentinels.node(sentinels.replica)
        replica.pause()
        try:
            assert await operator.credit(ACCOUNT, 7, "grant") == (12, False)
        finally:
            replica.resume()
        assert "no replica has it yet" in caplog.text


async def test_an_orderly_change_of_primary(sentinels: ValkeySentinels, metrics: Metrics) -> None:
    failovers: list[None] = []
    async with adding_store(sentinels.url, metrics, 1000) as store:
        store.on_failover = lambda: failovers.append(None)
        adds = Adds(store, [accounts_in(shard, 1)[0] for shard in range(10)])
        async with adds.load(workers=100):
            await adds.progress(500)
            await in_thread(sentinels.hand_over)
            await adds.progress(1000)
            async with asyncio.timeout(60):  # until then the old primary takes writes
                while not failovers:
                    await asyncio.sleep(0.01)
            await adds.progress(500)
        await adds.repeat_all()
        await adds.check_each_happened_once()


async def test_who_has_heard_of_a_failover_does_not_go_back(tmp_path: Path) -> None:
    """What the old primary takes after a failover is thrown away, while most sentinels may still name it."""
    with contextlib.ExitStack() as ends:
        old_port, new_port = free_ports(2)
        old, new = (ends.enter_context(valkey_server(port=port)) for port in (old_port, new_port))
        sentinels = []
        for primary, epoch in ((old_port, 0), (old_port, 0), (new_port, 1)):
            sentinels.append(LoneSentinel(tmp_path, "credits", primary, epoch))
            ends.callback(sentinels[-1].kill)
        *behind, ahead = sentinels
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        url = read_url(f"redis+sentinel://{addresses}/credits")
        locator = SentinelLocator(url, 1000, Opener(1000, "standalone", []))

        async def opened() -> str:
            connection, node = await locator.open()
            connection.close()
            return node.run_id

        runs = [server.command("INFO", "server")["run_id"] for server in (old, new)]  # type: ignore[index]
        ahead.pause()
        assert await opened() == runs[0]
        ahead.resume()
        for sentinel in behind:
            sentinel.pause()
        assert await locator.replaced()
        for sentinel in behind:
            sentinel.resume()
        ahead.pause()
        assert await opened() == runs[1]
        assert not await locator.replaced()
        assert await opened() == runs[1]
        # Unless that node is no primary: then the failover was taken back.
        new.command("REPLICAOF", "127.0.0.1", old_port)
        with pytest.raises(StoreUnavailable, match="is a replica"):
            await opened()
        assert await opened() == runs[0]


async def test_a_primary_that_hangs_is_replaced(sentinels: ValkeySentinels, metrics: Metrics) -> None:
    async with adding_store(sentinels.url, metrics, 1000) as store:
        await add(store, ACCOUNT, "before", 1)
        hung = sentinels.node(sentinels.primary)
        hung.pause()
        try:
            adds = Adds(store, [ACCOUNT])
            async with adds.load(workers=5):
                await adds.progress(50)
        finally:
            hung.resume()
        assert adds.unavailable > 0


async def test_a_sentinel_that_hangs_and_one_that_is_dead_do_not_matter(
    sentinels: ValkeySentinels, metrics: Metrics
) -> None:
    alive = ",".join(f"127.0.0.1:{port}" for port in sentinels.sentinel_ports)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        others = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{free_port()}"
        async with adding_store(f"redis+sentinel://{others},{alive}/{sentinels.NAME}/2", metrics, 1000) as store:
            assert await add(store, ACCOUNT, "op", 1) == (True, 1)
            assert await store.scan("qg1:{07}:account:*") == [f"qg1:{{07}}:account:{ACCOUNT}"]


async def test_a_password(metrics: Metrics) -> None:
    with valkey_sentinels(password="s3cret") as sentinels:
        async with adding_store(sentinels.url, metrics, 1000) as store:
            assert await add(store, ACCOUNT, "op", 1) == (True, 1)
        with pytest.raises(StoreRefused, match=r"NOAUTH|WRONGPASS"):
            async with adding_store(sentinels.url.replace(":s3cret@", ""), metrics, 1000):
                pass


async def test_a_wrong_url_gets_a_clear_error(sentinels: ValkeySentinels, metrics: Metrics) -> None:
    async def refusal_of(url: str) -> str:
        with pytest.raises(StoreError) as caught:
            async with adding_store(url, metrics, 1000):
                pass
        return str(caught.value)

    assert "knows no primary called 'nobody'" in await refusal_of(sentinels.url.replace(sentinels.NAME, "nobody"))
    assert "must name the primary" in await refusal_of(sentinels.url.replace(f"/{sentinels.NAME}", ""))
    assert "use a redis+sentinel:// URL" in await refusal_of(f"redis://127.0.0.1:{sentinels.sentinel_ports[0]}")
    assert "cannot reach" in await refusal_of(f"redis+sentinel://127.0.0.1:{free_port()}/{sentinels.NAME}")


async def test_a_primary_that_would_lose_credits_is_refused(metrics: Metrics) -> None:
    with valkey_sentinels("--appendonly", "no") as sentinels:
        with pytest.raises(StoreUnsuitable, match="set appendonly yes"):
            async with adding_store(sentinels.url, metrics, 1000):
                pass
        async with adding_store(sentinels.url, metrics, 1000, allow_unsafe=True) as store:
            assert await add(store, ACCOUNT, "op", 1) == (True, 1)
