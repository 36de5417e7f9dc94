"""What requests and accounts cost the store: ``python -m tests.benchmarks.store``, with ``--help`` for its numbers.

Starts the embedded store with its own settings (append-only file, synced every second) in a temporary directory and
calls it as the gateway does: through a connection of the gateway's, many requests in flight, commands of the same
moment written together. Accounts have one window, prepaid credits and a key; requests name a model, and settle with a
note as the gateway writes it.

- A pair is one reserve and one settle. Its cost is CPU time of the server's main thread, as the server itself tells it
  (INFO cpu), so it matters little who else is busy, and not at all what the client costs. Best of ROUNDS: neighbours
  can only add.
- Bytes are used_memory with so many accounts less that without, and with so many open reservations less that without,
  divided by their number. An idle account has had a request; not counted are its ledger, which goes to the archive, the
  request's record, which goes after a day, and its keys, of which it may have any number: a key is told by itself. An
  open reservation is its record and its member of the due set.
"""

import argparse
import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from gateway.credits import scripts
from gateway.credits.embedded import EmbeddedStore
from gateway.credits.keyspace import SHARDS, reservation_id, shard_keys, shard_of
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.domain.decision import Reserved
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.telemetry.metrics import Metrics
from tests.stores import started_store

ROUNDS = 3

_PLAN = Plan("standard", (Allowance("monthly", 15_000_000_000, DAY_MS),))
_PLANS = {_PLAN.name: _PLAN}
_MODEL = "meta-llama/Llama-3.3-70B-Instruct"
_NOTE = '{"price":"0a1b2c3d","tokens":{"input":1234,"output":567},"source":"api"}'
_HOLD = Cost(7_077_888, 7_077_888)
_COST = Cost(1_222_848, 1_222_848)
_LEASE_MS = 60_000
_IN_FLIGHT = 128
_BUSY = 1000  # accounts that send requests at the same time
_MAIN_THREAD = ("used_cpu_user_main_thread:", "used_cpu_sys_main_thread:")

#: An account's name, and the id of its key.
Customer = tuple[str, str]


def measure(pairs: int = 20_000, accounts: int = 20_000, reservations: int = 50_000) -> dict[str, float]:
    """``pair_us`` and ``pairs_per_second`` of one core; ``account_bytes``, ``key_bytes`` and ``reservation_bytes``.
    Call it from the main thread: the server ends with that."""
    return uvloop.run(_measure(pairs, accounts, reservations))


async def _measure(pairs: int, accounts: int, reservations: int) -> dict[str, float]:
    # Each on a server of its own: what fills one makes it rewrite its file, which has a cost of its own.
    async with _store() as store:
        customers, _ = await _sizes(store, _BUSY, 1)
        pair_us = await _pair_us(store, customers, pairs)
    async with _store() as store:
        _, sizes = await _sizes(store, accounts, reservations)
    return {"pair_us": pair_us, "pairs_per_second": 1e6 / pair_us, **sizes}


@asynccontextmanager
async def _store() -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory(prefix="qg-store-") as directory:
        server = EmbeddedStore(Path(directory))
        await server.start()
        try:
            async with started_store(server.url, Metrics(_PLANS, [_MODEL]), 60_000) as store:
                yield store
        finally:
            await server.stop()


async def _in_flight(calls: Iterator[Coroutine[None, None, None]]) -> None:
    async def one_after_another() -> None:
        for call in calls:
            await call

    await asyncio.gather(*(one_after_another() for _ in range(_IN_FLIGHT)))


# --- time -----------------------------------------------------------------------------------------------------------


async def _pair_us(store: Store, customers: list[Customer], pairs: int) -> float:
    rounds = []
    for _ in range(ROUNDS):
        before_us = await _cpu_us(store)
        await _in_flight(_pair(store, customers[number % len(customers)]) for number in range(pairs))
        rounds.append((await _cpu_us(store) - before_us) / pairs)
    return min(rounds)


async def _cpu_us(store: Store) -> float:
    """User and system time of the server's main thread so far."""
    lines = (await store.call("INFO", "cpu")).decode().splitlines()
    return sum(float(line.partition(":")[2]) for line in lines if line.startswith(_MAIN_THREAD)) * 1e6


async def _pair(store: Store, customer: Customer) -> None:
    reserved = await _reserve(store, customer)
    await scripts.settle(
        store,
        customer[0],
        reserved.reservation_id,
        plan=_PLAN,
        cost=_COST,
        note=_NOTE,
        created_ms=reserved.funds.now_ms,
        key_id=customer[1],
        model=_MODEL,
    )


async def _reserve(store: Store, customer: Customer) -> Reserved:
    account, key_id = customer
    reserved = await scripts.reserve(
        store,
        account,
        reservation_id(account, secrets.token_hex(12)),
        plan=_PLAN,
        amount=_HOLD,
        minimum_nano=_HOLD.payg_nano,
        alone_nano=_HOLD.payg_nano,
        lease_ms=_LEASE_MS,
        key_id=key_id,
        model=_MODEL,
    )
    assert isinstance(reserved, Reserved), reserved
    return reserved


# --- space ----------------------------------------------------------------------------------------------------------


async def _sizes(store: Store, accounts: int, reservations: int) -> tuple[list[Customer], dict[str, float]]:
    names = [f"customer-{number}" for number in range(accounts)]
    operator = Operator(store, _PLANS, _PLAN.name)
    customers: list[Customer] = []

    async def open_account(name: str) -> None:
        await operator.create_account(name)
        await operator.credit(name, 10_000_000_000, "grant", f"op_{name}")
        await _forget(store, name, f"op:{name}:op_{name}")
        reserved = await _reserve(store, (name, ""))
        await scripts.settle(store, name, reserved.reservation_id, plan=_PLAN, cost=_COST, note=_NOTE)
        await _forget(store, name, reserved.reservation_id)

    async def make_key(name: str) -> None:
        key, _ = await operator.create_key(name)
        customers.append((name, key.id.removeprefix("key_")))

    async def reserve(customer: Customer) -> None:
        await _reserve(store, customer)

    empty = await _used_bytes(store)
    await _in_flight(open_account(name) for name in names)
    with_accounts = await _used_bytes(store)
    await _in_flight(make_key(name) for name in names)
    with_keys = await _used_bytes(store)
    await _in_flight(reserve(customers[number % accounts]) for number in range(reservations))
    with_reservations = await _used_bytes(store)
    return customers, {
        "account_bytes": (with_accounts - empty) / accounts,
        "key_bytes": (with_keys - with_accounts) / accounts,
        "reservation_bytes": (with_reservations - with_keys) / reservations,
    }


async def _forget(store: Store, account: str, record: str) -> None:
    """What the reaper does with a record whose time is over."""
    keys = shard_keys(shard_of(account))
    await asyncio.gather(store.call("HDEL", keys.records, record), store.call("ZREM", keys.due, record))


async def _used_bytes(store: Store) -> int:
    """The server's used_memory, once the ledger is archived."""
    for shard in range(SHARDS):
        await store.call("XTRIM", shard_keys(shard).ledger, "MAXLEN", 0)
    lines = (await store.call("INFO", "memory")).decode().splitlines()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("used_memory:"))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--accounts", type=int, default=20_000)
    parser.add_argument("--open", type=int, default=50_000, help="open reservations")
    args = parser.parse_args()
    figures = measure(args.pairs, args.accounts, args.open)
    print(f"{figures['pair_us']:7.1f} µs of the server's main thread for each reserve and settle")
    print(f"{figures['pairs_per_second']:7.0f} pairs per second and core of the store")
    print(f"{figures['account_bytes']:7.0f} bytes for each idle account")
    print(f"{figures['key_bytes']:7.0f} bytes for each API key")
    print(f"{figures['reservation_bytes']:7.0f} bytes for each open reservation")


if __name__ == "__main__":
    main()
