"""Many streams over two gateways on one small account: all of it can be used, and nothing beyond it is spent."""

from decimal import Decimal
from pathlib import Path

import aiohttp

from tests.acceptance.conftest import funds_of, new_account
from tests.benchmarks.overspend_load import Account, budget_of, spend, truth_of
from tests.gateway_process import gateway_config, running_gateway
from tests.servers import MovableClock, valkey_server
from tests.upstreams.process import server_process

MODEL, NAME = "talk", "alice"
STREAMS = 16
#: For as many average answers; were their limits held instead, only four could run at once.
BUDGET = budget_of(60)
WINDOW = "86400000"


async def test_streams_use_up_an_account_and_never_more(
    session: aiohttp.ClientSession, clock: MovableClock, tmp_path: Path
) -> None:
    plans = {"day": {"default": True, "allowance": {"per_window": f"{BUDGET:f}", "refresh": "24h"}, "payg": False}}
    with valkey_server(clock=clock) as store, server_process("tests.benchmarks.overspend_upstream") as upstream:
        config = gateway_config(upstream.base_url, [MODEL], plans=plans) | {
            "store": {"url": store.url},
            "archive": {"url": f"sqlite://{tmp_path}/ledger.sqlite3"},
        }
        with (
            running_gateway(config, data_dir=tmp_path / "one", clock=clock) as one,
            running_gateway(config, data_dir=tmp_path / "two", clock=clock) as two,
        ):
            account = Account(NAME, new_account(one, NAME, "day"), "test")
            spent = await spend(session, account, [one.base_url, two.base_url], MODEL, STREAMS)
            truth = await truth_of(session, upstream.base_url, NAME)
            assert spent.delivered <= BUDGET
            # Only of a stream that was cut has the upstream written what nobody was handed: until it heard of it.
            assert truth <= BUDGET or spent.cut
            assert spent.delivered >= Decimal("0.97") * BUDGET
            assert spent.peak == STREAMS

            funds = funds_of(one, NAME)
            assert (funds.granted, funds.used, funds.held) == (BUDGET, spent.charged, Decimal(0))
            entries = one.cli("ledger", "tail", NAME, "-n", "1000")["data"]
            charges = [Decimal(entry["postings"][f"used:{WINDOW}"]) for entry in entries if entry["kind"] == "settle"]
            assert len(charges) == spent.requests
            assert sum(charges) == spent.charged
            assert one.cli("ledger", "verify")["ok"]
