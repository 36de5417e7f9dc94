"""A gateway dies at every moment of a request's life: what is charged in the end, and what is still held."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.credits.embedded import running_url
from tests.faults.bench import (
    DEAF_MODEL,
    Books,
    Client,
    Customer,
    Place,
    Talk,
    books_of,
    cost_nano,
    output_nano,
    serving,
    until,
)
from tests.faults.store_proxy import StoreProxy, Where
from tests.faults.table import measured
from tests.faults.upstream import CountingUpstream, Exchange
from tests.gateway_process import Gateway

#: Output tokens that a stream of an unknown model holds at a time; its hold grows when half of them are left.
SLICE = 256
WHOLE_TOKENS = 500


@dataclass
class Stage:
    """Brings requests to the moment at which their gateway will die."""

    gateway: Gateway
    upstream: CountingUpstream
    books: Books
    client: Client

    async def unheard(self, customer: Customer, *, stream: bool) -> Talk:
        """Forwarded, but the upstream has not taken it."""
        talk, _ = self.client.begin(self.gateway, customer, stream=stream, model=DEAF_MODEL)
        await self._holding(customer)
        return talk

    async def heard(self, customer: Customer, *, stream: bool) -> tuple[Talk, Exchange]:
        """The upstream has it, and has not said a word."""
        talk, _ = self.client.begin(self.gateway, customer, stream=stream)
        return talk, await self.upstream.next()

    async def streaming(self, customer: Customer, *portions: int) -> tuple[Talk, Exchange]:
        """The client has these portions of output; before the last one, the others were recorded as seen."""
        talk, exchange = await self.heard(customer, stream=True)
        await exchange.headers()
        for number, tokens in enumerate(portions):
            if number:
                await until(lambda: self._seen_any(customer))
            await exchange.emit(tokens)
            await until(lambda: talk.tokens == exchange.tokens)
        return talk, exchange

    async def _holding(self, customer: Customer) -> None:
        async def holds() -> bool:
            return bool(await self.books.open(customer))

        await until(holds)

    async def _seen_any(self, customer: Customer) -> bool:
        return (await self.books.seen(customer))[1] > 0


async def streams_at_every_moment(stage: Stage, customers: list[Customer]) -> list[Talk]:
    """A stream in each state that it can be in between two calls to the store."""
    quiet, heard, headed, young, grown, finished = customers
    talks = [await stage.unheard(quiet, stream=True)]
    talks.append((await stage.heard(heard, stream=True))[0])
    talks.append((await stage.streaming(headed))[0])
    talks.append((await stage.streaming(young, 10))[0])
    # As many behind the extension as there can be before the next.
    talks.append((await stage.streaming(grown, 3 * SLICE // 4, SLICE // 2))[0])
    talk, exchange = await stage.streaming(finished, 3 * SLICE // 4, 20)
    await exchange.finish()
    return [*talks, talk]


@pytest.fixture
async def stage(
    shared: Place, books: Books, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> AsyncIterator[Stage]:
    """With a gateway on the module's store, to be killed."""
    async with serving(upstream, tmp_path / "victim", shared) as gateway:
        yield Stage(gateway, upstream, books, client)


async def customers_of(books: Books, test: str, count: int) -> list[Customer]:
    return [await books.customer(f"{test}-{number}") for number in range(count)]


async def charged_tokens(books: Books, customer: Customer) -> int:
    """Output tokens that the ledger says were charged."""
    return sum(entry.tokens.get("output", 0) for entry in await books.entries(customer))


async def test_a_stream_of_a_killed_gateway_is_charged_as_far_as_was_recorded(
    stage: Stage, books: Books, survivor: Gateway
) -> None:
    """The hold ends with its lease, by the word of another gateway; what was recorded by then is charged."""
    customers = await customers_of(books, "streams", 6)
    talks = await streams_at_every_moment(stage, customers)
    stage.gateway.kill()
    seen = [await books.seen(customer) for customer in customers]
    await books.leases_over(*customers)

    worst = 0
    for customer, talk, (seen_nano, seen_tokens) in zip(customers, talks, seen, strict=True):
        assert await books.charged_nano(customer) == seen_nano
        assert await charged_tokens(books, customer) == seen_tokens <= talk.tokens
        assert await books.charges(customer) == (["expire"] if seen_nano else [])
        worst = max(worst, talk.tokens - seen_tokens)
    assert seen[4][1] >= 3 * SLICE // 4
    assert seen[5][1] >= 3 * SLICE // 4
    assert worst <= SLICE // 2
    assert "ran out" in survivor.stderr
    await books.verified()
    measured("gateway killed, streamed", worst, "tokens", f"{talks[4].tokens} ({output_nano(worst):.0f} nano-credits)")


async def test_a_whole_answer_of_a_killed_gateway_is_charged_only_if_it_was_settled(
    stage: Stage, books: Books, client: Client, survivor: Gateway
) -> None:
    unheard, heard, settled = await customers_of(books, "whole", 3)
    talk, exchange = await stage.heard(settled, stream=False)
    await exchange.answer(WHOLE_TOKENS)
    await until(lambda: talk.complete)
    await stage.unheard(unheard, stream=False)
    await stage.heard(heard, stream=False)
    stage.gateway.kill()
    await books.leases_over(unheard, heard)
    assert [await books.charged_nano(one) for one in (unheard, heard, settled)] == [0, 0, cost_nano(WHOLE_TOKENS)]
    assert "ran out" in survivor.stderr
    await books.verified()
    measured("gateway killed, whole", 0, "tokens", "what the upstream had not answered yet")


@pytest.mark.long
async def test_a_slow_stream_is_recorded_when_its_lease_is_renewed(
    stage: Stage, books: Books, survivor: Gateway
) -> None:
    (customer,) = await customers_of(books, "slow", 1)
    talk, exchange = await stage.streaming(customer, 1)
    while not (await books.seen(customer))[1]:
        assert exchange.tokens < SLICE // 2, "by now the hold has grown"
        await exchange.emit(1)
        await asyncio.sleep(0.5)
    await until(lambda: talk.tokens == exchange.tokens)
    await killed_slowly(stage, customer, talk)
    assert "ran out" in survivor.stderr


@pytest.mark.long
async def test_a_stream_that_pauses_is_recorded_when_its_lease_is_renewed(
    stage: Stage, books: Books, survivor: Gateway
) -> None:
    (customer,) = await customers_of(books, "pausing", 1)
    talk, _ = await stage.streaming(customer, 10)
    lease = await lease_of(books, customer)
    for _ in range(2):  # the first renewal may have been under way
        await until(lambda before=lease: lease_after(books, customer, before))
        lease = await lease_of(books, customer)
    await killed_slowly(stage, customer, talk)
    assert "ran out" in survivor.stderr


async def killed_slowly(stage: Stage, customer: Customer, talk: Talk) -> None:
    """Kill the gateway; most of what the stream has shown must be charged."""
    stage.gateway.kill()
    _, seen_tokens = await stage.books.seen(customer)
    await stage.books.leases_over(customer)
    assert 0 < seen_tokens == await charged_tokens(stage.books, customer) <= talk.tokens
    lost = talk.tokens - seen_tokens
    assert lost <= talk.tokens // 2
    measured("gateway killed, streamed", lost, "tokens", f"{talk.tokens}, which came slowly")


async def lease_of(books: Books, customer: Customer) -> int:
    """When the lease of the customer's only open reservation ends."""
    (one,) = await books.open(customer)
    return one.lease_expires_at_ms


async def lease_after(books: Books, customer: Customer, before: int) -> bool:
    return await lease_of(books, customer) > before


#: Where the call to the store was when its gateway died, and whether the store ran it.
CALLS = [
    pytest.param("before", False, id="lost"),
    pytest.param("before", True, id="under way"),
    pytest.param("after", True, id="answered"),
]


@pytest.mark.long
@pytest.mark.parametrize(("where", "ran"), CALLS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_gateway_killed_while_it_reserves_leaves_a_hold_that_ends(
    shared: Place,
    books: Books,
    upstream: CountingUpstream,
    client: Client,
    survivor: Gateway,
    tmp_path: Path,
    stream: bool,
    where: Where,
    ran: bool,
) -> None:
    customer = await books.customer(f"reserving-{stream}-{where}-{ran}")
    async with StoreProxy(shared.url) as proxy:
        async with serving(upstream, tmp_path / "victim", shared.by_way_of(proxy.url)) as gateway:
            trap = proxy.catch("reserve", where, cut=False)
            client.begin(gateway, customer, stream=stream)
            await trap.caught()
            gateway.kill()
        if ran:
            trap.let_go()
            await until(lambda: _is_open(books, customer))
    await books.leases_over(customer)
    assert await books.charged_nano(customer) == 0
    assert upstream.exchanges == []
    await books.verified()


@pytest.mark.long
@pytest.mark.parametrize(("where", "ran"), CALLS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_gateway_killed_while_it_settles_charges_once_or_what_was_recorded(
    shared: Place,
    books: Books,
    upstream: CountingUpstream,
    client: Client,
    survivor: Gateway,
    tmp_path: Path,
    stream: bool,
    where: Where,
    ran: bool,
) -> None:
    customer = await books.customer(f"settling-{stream}-{where}-{ran}")
    seen_nano = seen_tokens = 0
    async with StoreProxy(shared.url) as proxy:
        async with serving(upstream, tmp_path / "victim", shared.by_way_of(proxy.url)) as gateway:
            stage = Stage(gateway, upstream, books, client)
            if stream:
                talk, exchange = await stage.streaming(customer, 3 * SLICE // 4, 20)
                trap = proxy.catch("settle", where, cut=False)
                await exchange.finish()
                await exchange.done()
            else:
                talk, exchange = await stage.heard(customer, stream=False)
                trap = proxy.catch("settle", where, cut=False)
                await exchange.answer(WHOLE_TOKENS)
            await trap.caught()
            gateway.kill()
        if where == "before":
            seen_nano, seen_tokens = await books.seen(customer)
        if ran:
            trap.let_go()
            await books.ended(customer)
    await books.leases_over(customer)
    assert not talk.complete
    assert await books.charged_nano(customer) == (cost_nano(exchange.tokens) if ran else seen_nano)
    assert await books.charges(customer) == (["settle"] if ran else ["expire"] if stream else [])
    await books.verified()
    if stream:
        assert exchange.tokens == talk.tokens
        lost = 0 if ran else talk.tokens - seen_tokens
        measured("gateway killed, settling", lost, "tokens", f"{talk.tokens}")
    elif not ran:
        measured("gateway killed, whole", exchange.tokens, "tokens", f"an answer of {exchange.tokens}")


async def _is_open(books: Books, customer: Customer) -> bool:
    return bool(await books.open(customer))


async def test_with_an_embedded_store_the_next_start_charges_what_was_recorded(
    upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    archive = f"sqlite:///{data_dir}/ledger.sqlite3"
    async with serving(upstream, data_dir) as gateway:
        url = running_url(data_dir)
        assert url is not None
        async with books_of(Place(url, archive)) as books:
            stage = Stage(gateway, upstream, books, client)
            streamed, whole = await customers_of(books, "embedded", 2)
            talk, _ = await stage.streaming(streamed, 3 * SLICE // 4, SLICE // 2)
            await stage.heard(whole, stream=False)
            seen_nano, seen_tokens = await books.seen(streamed)
            gateway.kill()
    async with serving(upstream, data_dir):
        url = running_url(data_dir)
        assert url is not None
        async with books_of(Place(url, archive)) as books:
            await asyncio.gather(books.ended(streamed), books.ended(whole))
            assert await books.charged_nano(streamed) >= seen_nano
            charged = await charged_tokens(books, streamed)
            assert seen_tokens <= charged <= talk.tokens
            assert await books.charged_nano(whole) == 0
            await books.verified()
    assert talk.tokens - charged <= SLICE // 2
    measured("gateway killed, embedded", talk.tokens - charged, "tokens", f"{talk.tokens}")


async def test_what_a_killed_gateway_left_in_its_journal_lands_at_its_next_start(
    shared: Place, books: Books, upstream: CountingUpstream, client: Client, tmp_path: Path
) -> None:
    customers = await customers_of(books, "journal", 4)
    data_dir = tmp_path / "data"
    async with (
        StoreProxy(shared.url) as proxy,
        serving(upstream, data_dir, shared.by_way_of(proxy.url)) as gateway,
    ):
        stage = Stage(gateway, upstream, books, client)
        heard = [await stage.heard(customer, stream=False) for customer in customers]
        await proxy.shut()
        for _, exchange in heard:
            await exchange.answer(WHOLE_TOKENS)
        await until(lambda: all(talk.complete for talk, _ in heard))
        gateway.kill()
    assert [len(await books.open(customer)) for customer in customers] == [1] * 4
    async with serving(upstream, data_dir, shared):
        for customer in customers:
            await books.ended(customer)
            assert await books.charged_nano(customer) == cost_nano(WHOLE_TOKENS)
            assert await books.charges(customer) == ["settle"]
    await books.verified()
    measured("gateway killed after the journal", 0, "settlements", "4")
