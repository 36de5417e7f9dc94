"""A gateway whose clock is off by ten minutes."""

from datetime import timedelta
from pathlib import Path

import pytest

from gateway.credits.keyspace import account_key
from gateway.domain.plan import DAY_MS, Allowance, Plan
from tests.acceptance.conftest import NOON
from tests.faults.bench import Books, Client, Customer, Place, Talk, books_of, cost_nano, place, serving
from tests.faults.table import measured
from tests.faults.upstream import CountingUpstream
from tests.gateway_process import Gateway
from tests.servers import MovableClock, valkey_server

DAILY = Plan("only", (Allowance("per_window", 100_000_000, DAY_MS),))
TOKENS = 100
MIDNIGHT = NOON + timedelta(hours=12)
FIVE_MINUTES_MS = 5 * 60_000


@pytest.mark.long
@pytest.mark.parametrize("minutes", [10, -10])
async def test_a_gateway_whose_clock_is_off_admits_within_a_window_and_refreshes_none(
    upstream: CountingUpstream, client: Client, tmp_path: Path, minutes: int
) -> None:
    """Five minutes before midnight a gateway that is ahead has the next day already, and one that is late not yet five
    minutes after it."""
    stores, gateways = MovableClock(tmp_path / "store-clock"), MovableClock(tmp_path / "gateway-clock")

    def set_clocks(offset_ms: int, minutes: int) -> None:
        stores.set_to(MIDNIGHT + timedelta(milliseconds=offset_ms))
        gateways.set_to(MIDNIGHT + timedelta(milliseconds=offset_ms, minutes=minutes))

    set_clocks(-FIVE_MINUTES_MS, minutes)
    plan = {"allowance": {"per_window": "0.1", "refresh": "24h"}}
    with valkey_server(clock=stores) as server:
        where: Place = place(server.url, tmp_path, stores)
        async with (
            books_of(where, DAILY) as books,
            serving(upstream, tmp_path / "data", where, clock=gateways, plan=plan) as gateway,
        ):
            customer = await books.customer("customer")
            opened = await window_end(books, customer)
            assert (await answered(client, gateway, customer, upstream)).status == 200
            assert await window_end(books, customer) == opened
            assert await used_nano(books, customer) == cost_nano(TOKENS)

            set_clocks(FIVE_MINUTES_MS, minutes)
            talk = await client.ask(gateway, customer)
            assert (talk.status, talk.code) == (503, "quota_store_unavailable")
            assert await window_end(books, customer) == opened

            set_clocks(FIVE_MINUTES_MS, 0)
            assert (await answered(client, gateway, customer, upstream)).status == 200
            assert await window_end(books, customer) == opened + DAY_MS
            assert await used_nano(books, customer) == cost_nano(TOKENS)
            await books.verified()
    measured("gateway's clock", 0, "windows refreshed", "2")


async def answered(client: Client, gateway: Gateway, customer: Customer, upstream: CountingUpstream) -> Talk:
    talk, task = client.begin(gateway, customer)
    await (await upstream.next()).answer(TOKENS)
    await task
    return talk


async def window_end(books: Books, customer: Customer) -> int:
    """The end of the window that the store has, whatever a request would make of it."""
    return int((await books.store.call("HGET", account_key(customer.name), "w1")).decode().split("|")[1])


async def used_nano(books: Books, customer: Customer) -> int:
    return (await books.operator.funds(customer.name)).used_nano
