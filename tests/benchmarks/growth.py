"""How a store grows and shrinks again: ``python -m tests.benchmarks.growth [--requests N] [--accounts N]``.

Runs so many requests (reserve and settle, pipelined on several connections) on a real server and prints what it holds:
at intervals, once the ledger is archived, and a day later, when ended reservations are forgotten. The figures in
README.md come from here; tests/faults/test_growth.py holds them to it.
"""

import argparse
import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import uvloop

from gateway.credits import scripts
from gateway.credits.archive import Archive
from gateway.credits.archiver import Archiver
from gateway.credits.keyspace import SHARDS, reservation_id
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.domain.decision import Reserved
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.telemetry.metrics import Metrics
from tests.servers import MovableClock, ValkeyServer, valkey_server

PLAN = Plan("standard", (Allowance("per_window", 100_000_000_000, DAY_MS),))
PLANS = {PLAN.name: PLAN}
MODEL = "meta-llama/Llama-3.3-70B-Instruct"
_NOTE = '{"price":"0a1b2c3d","tokens":{"input":1234,"output":567},"source":"api"}'
_COST = Cost(1_222_848, 1_222_848)
_HOLD = Cost(7_077_888, 7_077_888)
_LEASE_MS = 60_000
_IN_FLIGHT = 256
_DUE_AT_ONCE = 200

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """The server's used_memory in bytes: before anything, with its accounts, after the requests, with their ledger
    archived, and a day later. seconds: what the requests took."""

    empty: int
    accounts: int
    full: int
    archived: int
    forgotten: int
    seconds: float


@asynccontextmanager
async def stores_at(url: str, count: int) -> AsyncIterator[list[Store]]:
    stores = [Store(url, 10_000, Metrics(PLANS, [MODEL])) for _ in range(count)]
    for store in stores:
        await store.start()
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


async def measure(requests: int, accounts: int, connections: int, say: Say) -> Sizes:
    """Let a server of its own grow and shrink."""
    with tempfile.TemporaryDirectory(prefix="qg-growth-") as directory:
        clock = MovableClock(Path(directory) / "clock")
        with valkey_server(clock=clock) as server, patch.object(scripts, "gateway_ms", clock.now_ms):
            async with stores_at(server.url, connections) as stores:
                return await _measure(server, clock, stores, (requests, accounts), Path(directory), say)


async def _measure(
    server: ValkeyServer,
    clock: MovableClock,
    stores: list[Store],
    counts: tuple[int, int],
    directory: Path,
    say: Say,
) -> Sizes:
    requests, accounts = counts
    names = [f"customer-{number}" for number in range(accounts)]
    empty = used_bytes(server)
    operator = Operator(stores[0], PLANS, PLAN.name)
    for name in names:
        await operator.create_account(name)
        await operator.create_key(name)
    with_accounts = _told(server, f"{accounts} accounts", say)
    started = time.monotonic()
    tenth = -(-requests // 10)
    for done in range(0, requests, tenth):
        await request_on(stores, names, done, min(tenth, requests - done))
        full = _told(server, f"{min(done + tenth, requests)} requests, not archived", say)
    seconds = time.monotonic() - started
    archive = Archive("sqlite", directory)
    archiver = Archiver(stores[0], archive, Metrics(PLANS, [MODEL]))
    await archiver.sweep()
    await archive.close()
    archived = _told(server, "ledger archived", say)
    clock.move(DAY_MS + _LEASE_MS)
    for shard in range(SHARDS):
        while (await scripts.due(stores[0], shard, _DUE_AT_ONCE))[0] == _DUE_AT_ONCE:
            pass
    forgotten = _told(server, "a day later", say)
    return Sizes(empty, with_accounts, full, archived, forgotten, seconds)


async def request_on(stores: list[Store], names: list[str], first: int, count: int) -> None:
    """So many requests, each reserved and settled; they go round the accounts and the connections."""
    numbers = iter(range(first, first + count))

    async def ask_on(store: Store) -> None:
        for number in numbers:
            name = names[number % len(names)]
            reservation = reservation_id(name, secrets.token_hex(12))
            held = await scripts.reserve(
                store,
                name,
                reservation,
                plan=PLAN,
                amount=_HOLD,
                minimum_nano=_HOLD.payg_nano,
                alone_nano=_HOLD.payg_nano,
                lease_ms=_LEASE_MS,
                key_id="",
                model=MODEL,
            )
            assert isinstance(held, Reserved), held
            await scripts.settle(store, name, reservation, plan=PLAN, cost=_COST, note=_NOTE)

    await asyncio.gather(*(ask_on(stores[number % len(stores)]) for number in range(_IN_FLIGHT)))


def used_bytes(server: ValkeyServer) -> int:
    """The server's used_memory."""
    memory = server.command("INFO", "memory")
    assert isinstance(memory, dict)
    return int(memory["used_memory"])


def _told(server: ValkeyServer, what: str, say: Say) -> int:
    used = used_bytes(server)
    say(f"{used / 2**20:9.1f} MiB  {what}")
    return used


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--accounts", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=4)
    args = parser.parse_args()
    sizes = uvloop.run(measure(args.requests, args.accounts, args.connections, lambda line: print(line, flush=True)))
    print(f"{args.requests / sizes.seconds:.0f} requests/s, reserved and settled")
    print(
        f"{(sizes.full - sizes.archived) / args.requests:.0f} bytes for each entry of the ledger until it is archived"
    )
    print(f"{(sizes.archived - sizes.accounts) / args.requests:.0f} bytes for each request of the last 24 h")
    print(f"{(sizes.forgotten - sizes.empty) / args.accounts:.0f} bytes for each account that stays")


if __name__ == "__main__":
    main()
