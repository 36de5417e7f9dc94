"""A call to the store, or its reply, is lost: whatever it was, it happens once."""

from pathlib import Path

import pytest

from tests.faults.bench import Books, Client, Customer, Place, books_of, cost_nano, serving, until
from tests.faults.store_proxy import StoreProxy, Where
from tests.faults.table import measured
from tests.faults.upstream import CountingUpstream
from tests.gateway_process import Gateway

TOKENS = 700


async def through_reserve(client: Client, gateway: Gateway, customer: Customer, upstream: CountingUpstream) -> int:
    """Its cost, in nano-credits."""
    talk, task = client.begin(gateway, customer)
    await (await upstream.next()).answer(TOKENS)
    await task
    assert talk.status == 200
    return cost_nano(TOKENS)


async def through_extend(client: Client, gateway: Gateway, customer: Customer, upstream: CountingUpstream) -> int:
    """A stream that is longer than what it holds at first."""
    talk, task = client.begin(gateway, customer, stream=True)
    exchange = await upstream.next()
    await exchange.headers()
    while exchange.tokens < TOKENS:
        await exchange.emit(100)
        await until(lambda: talk.tokens == exchange.tokens)
    await exchange.finish()
    await exchange.done()
    await task
    assert talk.complete
    return cost_nano(TOKENS)


async def through_release(client: Client, gateway: Gateway, customer: Customer, upstream: CountingUpstream) -> int:
    """A request that the upstream leaves without an answer."""
    talk, task = client.begin(gateway, customer)
    (await upstream.next()).break_off()
    await task
    assert (talk.status, talk.code) == (502, "upstream_unavailable")
    return 0


CALLS = {
    "reserve": through_reserve,
    "extend": through_extend,
    "settle": through_reserve,
    "release": through_release,
}


async def test_a_lost_call_or_reply_happens_once(
    shared: Place, books: Books, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    wheres: tuple[Where, ...] = ("before", "after")
    async with (
        StoreProxy(shared.url) as proxy,
        serving(upstream, tmp_path, shared.by_way_of(proxy.url)) as gateway,
    ):
        for script, request in CALLS.items():
            for where in wheres:
                customer = await books.customer(f"{script}-{where}")
                trap = proxy.catch(script, where, cut=True)
                cost = await request(client, gateway, customer, upstream)
                await trap.caught()
                await books.ended(customer)
                assert await books.charged_nano(customer) == cost, (script, where)
                assert await books.charges(customer) == (["settle"] if cost else [])
                assert [one.customer for one in upstream.exchanges].count(customer.name) == 1
        await books.verified()
    measured("lost replies", 0, "nano-credits", f"{2 * len(CALLS)} calls")


@pytest.mark.parametrize("where", ["before", "after"])
async def test_a_grant_whose_reply_is_lost_happens_once(shared: Place, books: Books, where: Where) -> None:
    customer = await books.customer(f"grant-{where}")
    before = (await books.operator.funds(customer.name)).balance_nano
    async with StoreProxy(shared.url) as proxy, books_of(shared.by_way_of(proxy.url)) as remote:
        trap = proxy.catch("credit", where, cut=True)
        after, repeated = await remote.operator.credit(customer.name, 5, "grant", "op-1")
        await trap.caught()
    assert (after, repeated) == (before + 5, where == "after")
    assert (await books.operator.funds(customer.name)).balance_nano == before + 5
    assert [entry.kind for entry in await books.entries(customer)].count("grant") == 2
    await books.verified()
    measured("lost grant", 0, "grants", "2")
