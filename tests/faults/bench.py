"""What the fault tests share: gateways on a store, customers that ask them, and what was charged for it in the end."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp

from gateway.credits import scripts
from gateway.credits.archive import Period
from gateway.credits.auditor import Audit, Auditor, auditing
from gateway.credits.keyspace import shard_keys, shard_of
from gateway.credits.ledger import Entry
from gateway.credits.operator import OpenReservation, Operator
from gateway.credits.store import Store
from gateway.domain.plan import Plan
from gateway.telemetry.metrics import Metrics
from tests.faults.upstream import PROMPT_TOKENS, CountingUpstream
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.servers import MovableClock

PREPAID = Plan("prepaid")
GRANT_NANO = 10**9
MODEL, DEAF_MODEL = "counted", "deaf"
LEASE_MS = 60_000
#: The most output that a test's request asks for: more than a stream holds at a time.
MAX_TOKENS = 2000
_WAIT_S = 60
_NANO_PER_CREDIT = 10**9


def cost_nano(tokens: int) -> int:
    """What an answer of so many tokens costs where the upstream reports its usage."""
    return int(cost_of(PROMPT_TOKENS, tokens) * _NANO_PER_CREDIT)


def output_nano(tokens: int) -> Decimal:
    """What output tokens cost, not rounded, in nano-credits."""
    return cost_of(0, 1_000_000) * _NANO_PER_CREDIT / 1_000_000 * tokens


@dataclass(frozen=True)
class Place:
    """Where a store is, and the archive of its ledger. clock: what the store follows, where tests move it."""

    url: str
    archive: str
    clock: MovableClock | None = None

    def by_way_of(self, url: str) -> "Place":
        """The same, reached by another URL."""
        return replace(self, url=url)


def place(url: str, directory: Path, clock: MovableClock | None = None) -> Place:
    """A store whose archive is in the directory."""
    return Place(url, f"sqlite:///{directory}/ledger.sqlite3", clock)


def config_for(upstream: CountingUpstream, where: Place | None = None) -> dict[str, Any]:
    """A gateway's configuration: prepaid credits alone, a store that may be silent for half a second. Without a place
    its store is embedded."""
    config = gateway_config(upstream.base_url, [MODEL, DEAF_MODEL], plans={"prepaid": {"default": True}})
    config["upstreams"][DEAF_MODEL] = {"base_url": upstream.deaf_url}
    config["models"]["models"][DEAF_MODEL]["upstream"] = DEAF_MODEL
    config["store"] = {"timeout": "500ms"}
    if where is not None:
        config["store"]["url"] = where.url
        config["archive"] = {"url": where.archive}
    return config


@asynccontextmanager
async def serving(
    upstream: CountingUpstream,
    data_dir: Path,
    where: Place | None = None,
    *,
    clock: MovableClock | None = None,
    plan: dict[str, Any] | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway on the store, an embedded one without it. clock: the gateway's, where it is not the store's. plan: the
    only one, instead of one with prepaid credits alone.

    Its start and end leave the test's loop free: its store's proxy may run there.
    """
    config = config_for(upstream, where)
    if plan is not None:
        config["plans"] = {"only": {"default": True, **plan}}
    running = running_gateway(config, data_dir=data_dir, clock=clock or (where.clock if where else None))
    gateway = await asyncio.to_thread(running.__enter__)
    try:
        yield gateway
    except BaseException:
        await asyncio.to_thread(running.__exit__, *sys.exc_info())
        raise
    await asyncio.to_thread(running.__exit__, None, None, None)


@dataclass(frozen=True)
class Customer:
    """An account with prepaid credits, and its key."""

    name: str
    secret: str


@dataclass
class Talk:
    """One request of a customer's, and what came of it. tokens: those of a stream that the client has got."""

    status: int = 0
    tokens: int = 0
    complete: bool = False
    body: bytes = b""

    @property
    def code(self) -> str:
        """The error's code."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


@dataclass
class Books:
    """The operator's side of a store, on a connection of its own."""

    store: Store
    operator: Operator
    place: Place

    async def customer(self, name: str) -> Customer:
        """Open an account with GRANT_NANO."""
        await self.operator.create_account(name)
        await self.operator.credit(name, GRANT_NANO, "grant", f"first {name}".replace(" ", "-"))
        _, secret = await self.operator.create_key(name)
        return Customer(name, secret)

    async def open(self, customer: Customer) -> list[OpenReservation]:
        """The customer's reservations that have not ended."""
        return await self.operator.reservations(customer.name)

    async def record(self, customer: Customer) -> list[str]:
        """The fields of the customer's only open reservation."""
        (one,) = await self.open(customer)
        text = await self.store.call("HGET", shard_keys(shard_of(customer.name)).records, one.id)
        fields: list[str] = text.decode().split("|")
        return fields

    async def seen(self, customer: Customer) -> tuple[int, int]:
        """What the only open reservation has recorded: nano-credits, and output tokens."""
        # What was seen is the end of a record, and not there before.
        fields = [*await self.record(customer), "0", "0", "0", ""][:17]
        *_, seen_nano, _at_rate, _written_off, note = fields
        return int(seen_nano), json.loads(note)["tokens"]["output"] if note else 0

    async def ended(self, customer: Customer) -> None:
        """Return once nothing of the customer's is open. Raises TimeoutError after a minute or two."""
        assert await self.store.wait_connected(_WAIT_S)
        await until(lambda: self._nothing_open(customer))

    async def leases_over(self, *customers: Customer) -> None:
        """Move the clock behind every lease, and wait until nothing is open."""
        assert self.place.clock is not None
        self.place.clock.move(LEASE_MS + 1000)
        for customer in customers:
            await self.ended(customer)

    async def charged_nano(self, customer: Customer) -> int:
        """What was charged in all. Nothing may be held any more."""
        funds = await self.operator.funds(customer.name)
        assert funds.balance_held_nano == 0
        return GRANT_NANO - funds.balance_nano

    async def entries(self, customer: Customer) -> list[Entry]:
        """The customer's part of the ledger."""
        async with self._auditing() as auditor:
            return [entry async for entry in auditor.export(customer.name, Period())]

    async def lost_nano(self, upstream: CountingUpstream, *customers: Customer) -> int:
        """How much the charges of customers, of whom nothing is open any more, differ in all from what the upstream
        made for them; it must have reported all of it."""
        lost = 0
        for customer in customers:
            await self.ended(customer)
            mine = [one for one in upstream.exchanges if one.customer == customer.name]
            lost += abs(sum(cost_nano(one.tokens) for one in mine if one.whole) - await self.charged_nano(customer))
        return lost

    async def charges(self, customer: Customer) -> list[str]:
        """The kinds of the entries that settled or ended the customer's requests."""
        return [entry.kind for entry in await self.entries(customer) if entry.kind in ("settle", "expire", "lapse")]

    async def verified(self) -> Audit:
        """The audit of the whole store, which must find nothing."""
        async with self._auditing() as auditor:
            audit = await auditor.verify()
        assert audit.mismatches == [], "\n".join(map(str, audit.mismatches))
        assert audit.unchecked == []
        return audit

    def _auditing(self) -> AbstractAsyncContextManager[Auditor]:
        return auditing(self.store, self.place.archive, Path())

    async def _nothing_open(self, customer: Customer) -> bool:
        return not await self.open(customer)


@asynccontextmanager
async def books_of(where: Place, plan: Plan = PREPAID) -> AsyncIterator[Books]:
    """The books of a store whose gateways have this plan alone."""
    plans = {plan.name: plan}
    async with AsyncExitStack() as stack:
        if where.clock is not None:
            stack.enter_context(patch.object(scripts, "gateway_ms", where.clock.now_ms))
        store = Store(where.url, 10_000, Metrics(plans, [MODEL]))
        stack.push_async_callback(store.close)
        await store.start()
        yield Books(store, Operator(store, plans, plan.name), where)


@dataclass
class Client:
    """Asks gateways."""

    session: aiohttp.ClientSession
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def ask(self, gateway: Gateway, customer: Customer, *, stream: bool = False, model: str = MODEL) -> Talk:
        """One request, to its end. Raises what aiohttp raises where the gateway breaks off."""
        talk = Talk()
        await self._talk(gateway, customer, talk, stream, model)
        return talk

    def begin(
        self, gateway: Gateway, customer: Customer, *, stream: bool = False, model: str = MODEL
    ) -> tuple[Talk, asyncio.Task[None]]:
        """The same in the background; a broken connection only ends it."""
        talk = Talk()

        async def go() -> None:
            with contextlib.suppress(aiohttp.ClientError):
                await self._talk(gateway, customer, talk, stream, model)

        task = asyncio.get_running_loop().create_task(go())
        self._tasks.append(task)
        return talk, task

    async def close(self) -> None:
        """End what is still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _talk(self, gateway: Gateway, customer: Customer, talk: Talk, stream: bool, model: str) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": customer.name}],
            "max_tokens": MAX_TOKENS,
            **({"stream": True} if stream else {}),
        }
        headers = {"Authorization": f"Bearer {customer.secret}"}
        async with self.session.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers) as response:
            talk.status = response.status
            async for line in response.content:
                talk.body += line
                talk.tokens += b'"delta": {"content"' in line
            talk.complete = b"[DONE]" in talk.body if stream else True


@asynccontextmanager
async def a_client() -> AsyncIterator[Client]:
    """A client with as many connections as it needs."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session)
        try:
            yield client
        finally:
            await client.close()


class Traffic:
    """Customers that ask without a pause, every other request a stream; the gateways take turns.

    refused: requests that were answered with 503 and cost nothing. cut: streams that ended in an error.
    """

    def __init__(self, client: Client, upstream: CountingUpstream, gateways: list[Gateway]) -> None:
        self._client = client
        self._upstream = upstream
        self._gateways = gateways
        self._number = 0
        self.answered = 0
        self.refused = 0
        self.cut = 0

    @asynccontextmanager
    async def of(self, customers: list[Customer]) -> AsyncIterator[None]:
        """Until the block ends; every request that was begun is over then."""
        self._upstream.busy = True
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for customer in customers:
                group.create_task(self._ask_on(customer, stop))
            try:
                yield
            finally:
                stop.set()
        self._upstream.busy = False

    async def progress(self, count: int) -> None:
        """Return once so many more requests have been answered. Raises TimeoutError after a minute."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal)

    async def _ask_on(self, customer: Customer, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._number += 1
            stream = self._number % 2 == 0
            gateway = self._gateways[self._number % len(self._gateways)]
            talk = await self._client.ask(gateway, customer, stream=stream)
            if talk.status == 200:
                self.answered += talk.complete
                self.cut += not talk.complete
            else:
                assert (talk.status, talk.code) == (503, "quota_store_unavailable"), talk
                self.refused += 1
                await asyncio.sleep(0.1)


async def until(condition: Callable[[], Any], pause_s: float = 0.02) -> None:
    """Return once the condition, which may be a coroutine's, is true. Raises TimeoutError after a minute."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            outcome = condition()
            if await outcome if asyncio.iscoroutine(outcome) else outcome:
                return
            await asyncio.sleep(pause_s)
