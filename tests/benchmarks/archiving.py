"""What archiving the ledger costs: ``python -m tests.benchmarks.archiving [--rounds N] [--entries N] [--accounts N]``.

Each round writes so many entries as requests write them (reserve and settle on a real server) and then archives them
in SQLite on the disk; twice, as is done while requests come and while none does. Printed is the CPU of this process,
all threads, for the archiving alone: per entry, and for a sweep that finds nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path

import uvloop

from gateway.credits.archive import Archive
from gateway.credits.archiver import Archiver
from gateway.credits.operator import Operator
from gateway.telemetry.metrics import Metrics
from tests.benchmarks.growth import MODEL, PLAN, PLANS, request_on, stores_at
from tests.servers import valkey_server

_IDLE_SWEEPS = 50


async def measure(rounds: int, entries: int, accounts: int) -> None:
    """Print the figures of each round."""
    with tempfile.TemporaryDirectory(prefix="qg-archiving-", dir=Path.cwd()) as directory, valkey_server() as server:
        async with stores_at(server.url, 2) as stores:
            operator = Operator(stores[0], PLANS, PLAN.name)
            names = [f"customer-{number}" for number in range(accounts)]
            for name in names:
                await operator.create_account(name)
            archive = Archive("sqlite", Path(directory))
            archiver, quiet = Archiver(stores[0], archive, Metrics(PLANS, [MODEL])), False
            archiver.quiet = lambda: quiet
            await _sweep(archiver)
            for number in range(2 * rounds):
                await request_on(stores, names, number * entries, entries)
                quiet = number % 2 == 1
                seconds = await _sweep(archiver)
                when = "without requests" if quiet else "between requests"
                print(f"{seconds / entries * 1e6:7.1f} µs of CPU {when} for each of {entries} entries", flush=True)
            idle_s = sum([await _sweep(archiver) for _ in range(_IDLE_SWEEPS)]) / _IDLE_SWEEPS
            print(f"{idle_s * 1e6:7.0f} µs for a sweep that finds nothing")
            await archive.close()


async def _sweep(archiver: Archiver) -> float:
    started = time.process_time()
    await archiver.sweep()
    return time.process_time() - started


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=4000)
    parser.add_argument("--accounts", type=int, default=100)
    args = parser.parse_args()
    uvloop.run(measure(args.rounds, args.entries, args.accounts))


if __name__ == "__main__":
    main()
