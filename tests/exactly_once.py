"""A script that adds to an account once per operation id, and a load of such operations that is counted."""

import asyncio
import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from gateway.credits.errors import StoreUnavailable
from gateway.credits.keyspace import account_key, shard_keys, shard_of
from gateway.credits.store import Script, Store
from gateway.telemetry.metrics import Metrics
from tests.stores import started_store

_TEXT = """#!lua
-- KEYS 1 account hash, 2 shard's records; ARGV 1 operation id, 2 amount
local first = redis.call('HSETNX', KEYS[2], ARGV[1], '1')
if first == 1 then redis.call('HINCRBY', KEYS[1], 'balance', ARGV[2]) end
return {tostring(first), redis.call('HGET', KEYS[1], 'balance')}
"""
_ADD = Script("add", _TEXT, hashlib.sha1(_TEXT.encode()).hexdigest())
_PROGRESS_SECONDS = 60
_AT_ONCE = 1000


def adding_store(
    url: str, metrics: Metrics, timeout_ms: int = 5000, *, allow_unsafe: bool = False
) -> AbstractAsyncContextManager[Store]:
    """A started store for ``add``."""
    return started_store(url, metrics, timeout_ms, allow_unsafe=allow_unsafe, scripts=[_ADD])


async def add(store: Store, account: str, operation: str, amount: int) -> tuple[bool, int]:
    """Whether this was the first time for the operation id, and the balance."""
    keys = account_key(account), shard_keys(shard_of(account)).records
    first, balance = await store.run("add", keys, (f"{account} {operation}", amount))
    return first == b"1", int(balance)


def accounts_in(shard: int, count: int) -> list[str]:
    """Names of so many accounts of a shard."""
    names = (f"account-{i}" for i in itertools.count())
    return list(itertools.islice((name for name in names if shard_of(name) == shard), count))


class Adds:
    """Operations by id on some accounts, each repeated until it is answered.

    repeated: operations that were answered as already done. unavailable: attempts that were not answered.
    """

    def __init__(self, store: Store, accounts: list[str]) -> None:
        self._store = store
        self._accounts = accounts
        self._numbers = itertools.count()
        self._done: list[tuple[str, str]] = []
        self.repeated = 0
        self.unavailable = 0

    @asynccontextmanager
    async def load(self, workers: int) -> AsyncIterator[None]:
        """So many operations at once until the block ends; all that were begun are answered then.

        Raises what a worker saw, unless it was StoreUnavailable, which an operation is repeated for.
        """
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                number = next(self._numbers)
                await self._add(self._accounts[number % len(self._accounts)], f"op {number}")

        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())
            try:
                yield
            finally:
                stop.set()

    async def progress(self, count: int) -> None:
        """Wait until so many more operations are answered. Raises TimeoutError if that takes a minute."""
        goal = len(self._done) + count
        async with asyncio.timeout(_PROGRESS_SECONDS):
            while len(self._done) < goal:
                await asyncio.sleep(0.005)

    async def repeat_all(self) -> None:
        """Say every operation again."""
        done, self._done = self._done, []
        for first in range(0, len(done), _AT_ONCE):
            await asyncio.gather(*(self._add(account, operation) for account, operation in done[first:][:_AT_ONCE]))

    async def check_each_happened_once(self) -> None:
        """Every account has what its operations add up to."""
        expected = Counter(account for account, _ in self._done)
        balances = {account: await self._balance(account) for account in expected}
        assert balances == dict(expected)

    async def _balance(self, account: str) -> int:
        return int(await self._store.call("HGET", account_key(account), "balance"))

    async def _add(self, account: str, operation: str) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable):
                first, _ = await add(self._store, account, operation, 1)
                self.repeated += not first
                self._done.append((account, operation))
                return
            self.unavailable += 1
            await asyncio.sleep(0.02)
