"""Many streams at once on a small account: ``python -m tests.benchmarks.overspend [--streams N,…] [--out FILE]``.

Three gateway processes on one Valkey store stand before an upstream that counts every token that it writes. So many
clients stream over all three until the account has nothing left; then what the upstream counted is compared with the
account's budget. The same is done with two usual policies in place of the gateway (overspend_proxy.py).

overspend: what the upstream wrote beyond the budget. usable: the part of the budget that clients were handed answers
for. truncated: streams per account that did not come to their natural end. Clients wait 0.2 s instead of the second
that Retry-After says.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import uvloop

from tests.acceptance.conftest import new_account
from tests.benchmarks.overspend_load import MAX_TOKENS, Account, Spent, budget_of, spend, truth_of
from tests.benchmarks.overspend_proxy import COUNT_AFTER, RESERVE_MAXIMUM
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.servers import ValkeyServer, valkey_server
from tests.upstreams.process import server_process

GATEWAYS = 3
PRODUCT = "quota gateway"
POLICIES = (PRODUCT, COUNT_AFTER, RESERVE_MAXIMUM)
PLAN = "bench"
#: Accounts are measured side by side as long as there are not more streams in all.
_MOST_STREAMS = 128
_DAY_S = 86_400


@dataclass(frozen=True)
class Servers:
    """All that runs. base_urls: by policy."""

    store: ValkeyServer
    gateway: Gateway
    upstream_url: str
    base_urls: dict[str, list[str]]

    def account(self, policy: str, name: str, seed: str, budget: Decimal) -> Account:
        """A new account with the budget."""
        if policy == PRODUCT:
            return Account(name, new_account(self.gateway, name, PLAN), seed)
        nano = int(budget * 10**9)
        self.store.command("HSET", f"bench:{name}", "budget", nano, "used", 0, "held", 0)
        return Account(name, name, seed)


@dataclass(frozen=True)
class Measured:
    """One account's end. truth: the cost of all that the upstream wrote for it."""

    spent: Spent
    budget: Decimal
    truth: Decimal

    @property
    def overspend_percent(self) -> float:
        """Beyond the budget."""
        return float(max(Decimal(0), self.truth - self.budget) / self.budget * 100)

    @property
    def usable_percent(self) -> float:
        """Of the budget."""
        return float(self.spent.delivered / self.budget * 100)


@contextmanager
def running_servers(model_names: Sequence[str], budget: Decimal) -> Iterator[Servers]:
    """Three gateways and three proxies of each other policy, on one store and one upstream."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="qg-bench-")))
        store = stack.enter_context(valkey_server())
        upstream_url = stack.enter_context(server_process("tests.benchmarks.overspend_upstream")).base_url
        plans = {
            PLAN: {
                "default": True,
                "allowance": {"per_window": f"{budget:f}", "refresh": "24h"},
                "payg": False,
            }
        }
        config = gateway_config(upstream_url, model_names, plans=plans) | {
            "store": {"url": store.url},
            "archive": {"url": f"sqlite://{directory}/ledger.sqlite3"},
        }
        gateways = [
            stack.enter_context(running_gateway(config, data_dir=directory / str(number))) for number in range(GATEWAYS)
        ]
        socket = store.url.removeprefix("unix://")
        base_urls = {
            policy: [
                stack.enter_context(
                    server_process("tests.benchmarks.overspend_proxy", policy, socket, upstream_url)
                ).base_url
                for _ in range(GATEWAYS)
            ]
            for policy in (COUNT_AFTER, RESERVE_MAXIMUM)
        }
        yield Servers(store, gateways[0], upstream_url, {PRODUCT: [one.base_url for one in gateways], **base_urls})


def _model(streams: int) -> str:
    # A model of its own for each number of streams: none profits from what the gateway learned before.
    return f"bench-{streams}"


async def _measure(servers: Servers, policy: str, streams: int, accounts: int, budget: Decimal) -> list[Measured]:
    gate = asyncio.Semaphore(max(1, _MOST_STREAMS // streams))

    async def one(number: int) -> Measured:
        async with gate:
            name = f"{policy.replace(' ', '-')}-{streams}-{number}"
            account = servers.account(policy, name, f"{streams}/{number}", budget)
            spent = await spend(session, account, servers.base_urls[policy], _model(streams), streams)
            return Measured(spent, budget, await truth_of(session, servers.upstream_url, name))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*map(one, range(accounts)))


def _row(streams: int, policy: str, measured: list[Measured]) -> dict[str, Any]:
    over = [one.overspend_percent for one in measured]
    usable = [one.usable_percent for one in measured]
    spent = [one.spent for one in measured]
    return {
        "streams": streams,
        "policy": policy,
        "overspend_percent": mean(over),
        "overspend_percent_most": max(over),
        "usable_percent": mean(usable),
        "usable_percent_least": min(usable),
        "truncated_per_account": mean(one.truncated for one in spent),
        "truncated": [{"limited": one.limited, "cut": one.cut} for one in spent],
        "refused_per_account": mean(one.refused for one in spent),
        "requests_per_account": mean(one.requests for one in spent),
        "requests_per_second": mean(one.requests / one.seconds for one in spent),
        "peak_streams": max(one.peak for one in spent),
    }


_HEAD = (
    "| streams | policy | overspend % (most) | usable % (least) | truncated / account | refused tries | requests/s "
    "| peak in flight |\n|---|---|---|---|---|---|---|---|"
)


def _shown(row: dict[str, Any]) -> str:
    return (
        f"| {row['streams']} | {row['policy']} "
        f"| {row['overspend_percent']:.2f} ({row['overspend_percent_most']:.2f}) "
        f"| {row['usable_percent']:.2f} ({row['usable_percent_least']:.2f}) "
        f"| {row['truncated_per_account']:.1f} | {row['refused_per_account']:.0f} "
        f"| {row['requests_per_second']:.1f} | {row['peak_streams']} |"
    )


async def _run(servers: Servers, streams: Sequence[int], accounts: int, budget: Decimal) -> list[dict[str, Any]]:
    print(_HEAD)
    rows = []
    for number in streams:
        for policy in POLICIES:
            row = _row(number, policy, await _measure(servers, policy, number, accounts, budget))
            rows.append(row)
            print(_shown(row), flush=True)
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(description="overspend and waste of three policies, by concurrent streams")
    parser.add_argument("--streams", default="1,8,32,128", help="streams at once per account (default: %(default)s)")
    parser.add_argument("--accounts", type=int, default=5, help="per policy and number (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=300, help="average ones that an account can pay for")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    args = parser.parse_args()
    streams = [int(number) for number in args.streams.split(",")]
    if time.time() % _DAY_S > _DAY_S - 3600:
        parser.error("the allowance refreshes at midnight UTC, which may be too soon: run this later")
    budget = budget_of(args.requests)
    with running_servers([_model(number) for number in streams], budget) as servers:
        rows = uvloop.run(_run(servers, streams, args.accounts, budget))
    if args.out:
        settings = {"requests": args.requests, "accounts": args.accounts, "max_tokens": MAX_TOKENS}
        args.out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    _main()
