"""A gateway dies at every await of a request's life: what is charged in the end, and what is still held."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from gateway.credits.operator import Operator
from gateway.domain.plan import DAY_MS, Allowance, Plan
from tests.faults.bench import (
    GRANT_NANO,
    MAX_TOKENS,
    MODEL,
    PREPAID,
    Books,
    Client,
    Customer,
    Place,
    Talk,
    books_of,
    config_for,
    cost_nano,
    serving,
    until,
)
from tests.faults.dying_gateway import Moment, Order
from tests.faults.store_proxy import StoreProxy
from tests.faults.table import measured
from tests.faults.upstream import PROMPT_TOKENS, CountingUpstream, Exchange
from tests.gateway_process import Gateway, cost_of

_REPOSITORY = Path(__file__).parents[2]
_HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"
_LANES = 2
_POLL_S = 0.005

#: Output tokens that a stream of an unknown model holds at a time; its hold grows when half of them are left.
SLICE = 256
#: The portions that a stream's upstream writes. The first lets the hold grow; the second is more than it has by then.
FIRST, SECOND = 160, 300
WHOLE_TOKENS = 500
#: Less than a stream costs: prepaid credits pay the rest.
ALLOWANCE_NANO = 200_000
#: Less than a stream costs, and more than it holds after its first portion.
SCARCE_NANO = 340_000
MIXED = Plan("mixed", (Allowance("per_window", ALLOWANCE_NANO, DAY_MS),))


class Died(Exception):
    """The gateway is gone: nothing that was waited for will happen."""


@dataclass
class Life:
    """One request to a gateway of its own. points: where the gateway came to wait so far, in order.

    ended: the functions of the tasks that have ended. over: whether all have.
    """

    order: Order
    customer: Customer
    operator: Operator
    upstream: CountingUpstream
    death: asyncio.Task[int]
    talk: Talk = field(default_factory=Talk)

    @property
    def base_url(self) -> str | None:
        """Where the gateway listens; None until it does."""
        lines = (Path(self.order.directory) / "stdout").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.startswith("base URL")), None)

    @property
    def report(self) -> list[dict[str, Any]]:
        """What the gateway has said of the request."""
        lines = self.order.report.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def points(self) -> list[dict[str, str]]:
        return [line for line in self.report if "at" in line]

    @property
    def exchange(self) -> Exchange | None:
        """The request as the upstream got it."""
        return next((one for one in self.upstream.exchanges if one.customer == self.customer.name), None)

    async def reached(self, condition: Callable[[], Any]) -> None:
        """Return once the condition is true. Raises Died where the gateway died first."""
        await until(lambda: self.death.done() or condition(), _POLL_S)
        if self.death.done():
            raise Died

    async def heard(self) -> Exchange:
        """The upstream has the request."""
        await self.reached(lambda: self.exchange)
        assert self.exchange is not None
        return self.exchange

    async def waits_in(self, function: str) -> None:
        """The request itself, not one of its other tasks, waits in this function."""

        def waits() -> bool:
            mine = [one["chain"] for one in self.points if one["chain"].startswith("_Connection.")]
            return bool(mine) and function in mine[-1].split(" > ")

        await self.reached(waits)

    async def got(self, tokens: int, extensions: int) -> None:
        """The client has so many tokens, the hold has grown so often, and the upstream is waited for."""
        await self.reached(lambda: self.talk.tokens == tokens)
        await self.reached(lambda: self._ended("StreamHold.") == extensions)
        await self.waits_in("UpstreamAnswer.read")

    async def over(self) -> None:
        """Nothing is done for the request any more."""
        await self.reached(lambda: self.report and self.report[-1].get("left") == 0)

    def _ended(self, prefix: str) -> int:
        return sum(line.get("ended", "").startswith(prefix) for line in self.report)


async def whole(life: Life) -> None:
    exchange = await life.heard()
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": WHOLE_TOKENS}
    message = {"role": "assistant", "content": "tok " * WHOLE_TOKENS}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": usage}).encode()
    # Not its own `answer`: what comes in one piece is not waited for.
    await exchange._write(_HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
    await life.waits_in("UpstreamAnswer.body")
    exchange.tokens = WHOLE_TOKENS
    await exchange._write(body)


async def streamed(life: Life) -> None:
    exchange = await life.heard()
    await exchange.headers()
    await life.waits_in("UpstreamAnswer.read")
    await exchange.emit(FIRST)
    await life.got(FIRST, extensions=1)
    await exchange.emit(SECOND)
    await life.got(FIRST + SECOND, extensions=2)
    await exchange.finish()
    await life.reached(lambda: b'"stop"' in life.talk.body)
    await life.waits_in("UpstreamAnswer.read")
    await exchange.done()


async def cut_short(life: Life) -> None:
    exchange = await life.heard()
    await exchange.headers()
    await life.waits_in("UpstreamAnswer.read")
    # Only now: its upstream would have been told of a limit.
    await life.operator.credit(life.customer.name, GRANT_NANO - SCARCE_NANO, "deduct")
    await exchange.emit(FIRST)
    await life.got(FIRST, extensions=1)
    await exchange.emit(SECOND)


#: What a request goes through, and a function that it waits in there.
_PHASES = {
    "authenticate": "CreditEngine.authenticate",
    "body": "read_body",
    "reserve": "CreditEngine.reserve",
    "connect": "Pool.connect",
    "upstream": "UpstreamAnswer.head",
    "settle": "Ends.charge",
}
_WHOLE_PHASES = _PHASES | {"answer": "UpstreamAnswer.body", "closing write": "_Connection._stalled"}
_STREAM_PHASES = _PHASES | {
    "stream": "UpstreamAnswer.read",
    "hand out": "write",
    "closing write": "write_last",
    "extend": "CreditEngine.extend",
    "wait for credits": "StreamHold.more",
}
_JOURNAL_PHASES = _STREAM_PHASES | {"journal": "Journal.add", "sync": "Journal._run", "done": "Journal.done"}


@dataclass(frozen=True)
class Scenario:
    """A kind of request. drive: what its upstream does. phases: what it goes through.

    lossy: its gateway's store loses the first settlement, and then the reply to it.
    """

    name: str
    stream: bool
    drive: Callable[[Life], Awaitable[None]]
    phases: dict[str, str]
    plan: Plan = PREPAID
    lossy: bool = False


WHOLE = Scenario("whole", False, whole, _WHOLE_PHASES)
STREAMED = Scenario("streamed", True, streamed, _STREAM_PHASES)
BOTH_SOURCES = Scenario("both-sources", True, streamed, _STREAM_PHASES, MIXED)
CUT_SHORT = Scenario("cut-short", True, cut_short, _STREAM_PHASES)
JOURNALED = Scenario("journaled", True, streamed, _JOURNAL_PHASES, lossy=True)


async def lose_settlements(proxy: StoreProxy) -> None:
    """The first settlement is lost, and so is the reply to the second."""
    await proxy.catch("settle", "before", cut=True).caught()
    proxy.catch("settle", "after", cut=True)


@dataclass(frozen=True)
class Fate:
    """What was left of a request when its gateway had died.

    points: where it came to wait, in order. died_at: that at which it died; None if it did not come to it. made: tokens
    of the upstream's, None if it never heard of the request. seen: nano-credits and tokens that were recorded by then,
    None where nothing was held (any more). journal: what the gateway had still to say.
    """

    customer: Customer
    points: list[dict[str, str]]
    died_at: dict[str, str] | None
    talk: Talk
    made: int | None
    seen: tuple[int, int] | None
    journal: Path | None

    @property
    def settled(self) -> bool:
        """Whether the store had been told what it costs."""
        return self.made is not None and self.seen is None


@dataclass(frozen=True)
class Charge:
    """All that a customer was charged: nano-credits, the output tokens that they are for, the kinds of the entries."""

    nano: int
    tokens: int
    kinds: tuple[str, ...]


class Lane:
    """Starts gateways that die, one after the other."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, order: Order) -> "asyncio.Task[int]":
        """Start a gateway; its exit code, once it has ended."""
        self._say(json.dumps(asdict(order)))
        return asyncio.get_running_loop().create_task(self._exit_code())

    def kill(self) -> None:
        """End the gateway, if it has not ended."""
        self._say("")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    async def _exit_code(self) -> int:
        assert self._process.stdout is not None
        return int(await asyncio.to_thread(self._process.stdout.readline))


@pytest.fixture
def lanes(shared: Place) -> Iterator[list[Lane]]:
    """As many gateways can die at once."""
    assert shared.clock is not None
    command = [sys.executable, "-m", "tests.faults.dying_gateway"]
    environment = {**os.environ, **shared.clock.environment}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=_REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    with ExitStack() as stack:  # at its end their input ends, and they with it
        processes = [stack.enter_context(start()) for _ in range(_LANES)]
        yield [Lane(process) for process in processes]


@pytest.fixture
async def books(shared: Place) -> AsyncIterator[Books]:
    async with books_of(shared) as books:
        plans = {plan.name: plan for plan in (PREPAID, MIXED)}
        yield replace(books, operator=Operator(books.store, plans, PREPAID.name))


@dataclass
class Stage:
    """Runs requests, each on a gateway that dies."""

    books: Books
    upstream: CountingUpstream
    client: Client
    directory: Path
    lanes: asyncio.Queue[Lane]

    async def sweep(self, scenario: Scenario) -> list[Fate]:
        """Let a gateway die at every await that such a request comes to; the first only when all is done."""
        calm = await self.fate(scenario, 0, "sent")
        numbers = range(1, len(calm.points) + 2)  # it may come to one more, where pieces of its body came apart
        moments: tuple[Moment, ...] = ("sent", "answered")
        dead = await asyncio.gather(*(self.fate(scenario, number, moment) for number in numbers for moment in moments))
        return [calm, *dead]

    async def fate(self, scenario: Scenario, die_at: int, moment: Moment) -> Fate:
        """What becomes of a request whose gateway dies at its die_at-th await; 0: when all is done."""
        lane = await self.lanes.get()
        customer = await self._customer(scenario, f"{scenario.name}-{moment[0]}-{die_at:03}")
        directory = self.directory / customer.name
        (directory / "data").mkdir(parents=True)
        for name in ("stdout", "stderr", "report"):
            (directory / name).touch()
        async with AsyncExitStack() as stack:
            place = self.books.place
            if scenario.lossy:
                proxy = await stack.enter_async_context(StoreProxy(place.url))
                losing = asyncio.get_running_loop().create_task(lose_settlements(proxy))
                stack.callback(losing.cancel)
                place = place.by_way_of(proxy.url)
            config = directory / "config.yaml"
            config.write_text(yaml.safe_dump(self._config(place)))
            order = Order(str(config), str(directory / "data"), str(directory), die_at, moment)
            life = Life(order, customer, self.books.operator, self.upstream, lane.start(order))
            try:
                with contextlib.suppress(Died):
                    await life.reached(lambda: life.base_url)
                    await self._live(life, scenario)
            finally:  # else nothing would end it
                lane.kill()
            assert await life.death == -signal.SIGKILL, (directory / "stderr").read_text()
        self.lanes.put_nowait(lane)
        return await self._left_of(life)

    async def _live(self, life: Life, scenario: Scenario) -> None:
        asking = asyncio.get_running_loop().create_task(self._ask(life, scenario.stream))
        # The upstream's writes fail once the gateway is gone.
        with contextlib.suppress(Died, ConnectionError):
            await scenario.drive(life)
            await life.over()
        await asking

    async def _ask(self, life: Life, stream: bool) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": life.customer.name}],
            "max_tokens": MAX_TOKENS,
            **({"stream": True} if stream else {}),
        }
        text = json.dumps(body).encode()

        async def late() -> AsyncIterator[bytes]:
            yield text[:1]
            await life.waits_in("read_body")
            yield text[1:]

        headers = {"Authorization": f"Bearer {life.customer.secret}", "Content-Length": str(len(text))}
        url = f"{life.base_url}/chat/completions"
        with contextlib.suppress(aiohttp.ClientError, Died):
            async with self.client.session.post(url, data=late(), headers=headers) as response:
                life.talk.status = response.status
                async for line in response.content:
                    life.talk.body += line
                    life.talk.tokens += b'"delta": {"content"' in line
                life.talk.complete = b"[DONE]" in life.talk.body if stream else True

    async def _customer(self, scenario: Scenario, name: str) -> Customer:
        operator = self.books.operator
        await operator.create_account(name, scenario.plan.name)
        await operator.credit(name, GRANT_NANO, "grant", f"first-{name}")
        _, secret = await operator.create_key(name)
        return Customer(name, secret)

    def _config(self, place: Place) -> dict[str, Any]:
        config = config_for(self.upstream, place)
        # A busy machine is no fault.
        config["store"]["timeout"] = "10s"
        allowance = {"per_window": f"{ALLOWANCE_NANO / 1e9:f}", "refresh": "24h"}
        config["plans"] = {PREPAID.name: {"default": True}, MIXED.name: {"allowance": allowance}}
        return config

    async def charge_of(self, customer: Customer) -> Charge:
        """What it is by now. Nothing may be held any more."""
        funds = await self.books.operator.funds(customer.name)
        assert (funds.held_nano, funds.balance_held_nano) == (0, 0)
        entries = await self.books.entries(customer)
        nano = sum(entry.postings.get(book, 0) for entry in entries for book in ("spent", f"used:{DAY_MS}"))
        charges = [entry for entry in entries if entry.kind not in ("open", "grant", "deduct", "refresh")]
        tokens = charges[-1].tokens if charges else {}
        # One that takes the place of another takes its credits back.
        assert nano == int(cost_of(tokens.get("input", 0), tokens.get("output", 0)) * 10**9)
        return Charge(nano, tokens.get("output", 0), tuple(entry.kind for entry in charges))

    async def _left_of(self, life: Life) -> Fate:
        await self.books.store.call("PING")  # behind all that the gateway had sent
        held = await self.books.open(life.customer)
        points = life.points
        journals = [path for path in (Path(life.order.data_dir) / "journal").iterdir() if path.stat().st_size]
        return Fate(
            life.customer,
            points,
            points[life.order.die_at - 1] if 0 < life.order.die_at <= len(points) else None,
            life.talk,
            None if life.exchange is None else life.exchange.tokens,
            await self.books.seen(life.customer) if held else None,
            journals[0] if journals else None,
        )


@pytest.fixture
async def stage(books: Books, upstream: CountingUpstream, client: Client, lanes: list[Lane], tmp_path: Path) -> Stage:
    free: asyncio.Queue[Lane] = asyncio.Queue()
    for lane in lanes:
        free.put_nowait(lane)
    return Stage(books, upstream, client, tmp_path, free)


async def charged_as_it_was_left(stage: Stage, fate: Fate, full: Charge, *, stream: bool) -> int:
    """A request whose lease is over was charged what it costs, or what was recorded, once. The tokens that the client
    has got, or would have got of a whole answer, and nobody was charged for."""
    charge = await stage.charge_of(fate.customer)
    if fate.settled:
        assert charge == full
    else:
        seen_nano, seen_tokens = fate.seen or (0, 0)
        assert charge == Charge(seen_nano, seen_tokens, ("expire",) if seen_nano else ())
        assert seen_tokens <= fate.talk.tokens
    assert charge.tokens <= (fate.made or 0)
    # What the client has as a whole was settled, or will be.
    assert fate.settled or fate.journal or not fate.talk.complete
    return 0 if fate.settled else (fate.talk.tokens if stream else fate.made or 0) - charge.tokens


async def replayed(stage: Stage, fates: list[Fate], shared: Place) -> None:
    """Start one more gateway on the journals that the dead ones have left, and wait until the store knows all."""
    journal = stage.directory / "heir" / "journal"
    journal.mkdir(parents=True)
    for fate in fates:
        if fate.journal:
            fate.journal.rename(journal / fate.journal.name)
    async with serving(stage.upstream, journal.parent, shared):
        await until(lambda: not any(path.stat().st_size for path in journal.glob("*.journal")))


def swept_all(scenario: Scenario, fates: list[Fate]) -> int:
    """Nearly every gateway died where it should have, and some in each phase; at how many different awaits."""
    died_at = [fate.died_at for fate in fates if fate.died_at]
    assert len(died_at) > len(fates) * 9 // 10
    functions = {function for point in died_at for function in point["chain"].split(" > ")}
    assert not set(scenario.phases.values()) - functions
    return len({(point["at"], point["chain"]) for point in died_at})


async def costs_as_it_should(stage: Stage, scenario: Scenario, calm: Fate) -> Charge:
    """What a request costs whose gateway did not die before its end."""
    assert calm.settled
    assert calm.talk.complete
    assert calm.made is not None
    full = await stage.charge_of(calm.customer)
    assert full.kinds == ("settle",)
    if scenario is CUT_SHORT:
        assert full.tokens == calm.talk.tokens < calm.made
    else:
        assert full == Charge(cost_nano(calm.made), calm.made, ("settle",))
    if scenario is BOTH_SOURCES:
        funds = await stage.books.operator.funds(calm.customer.name)
        assert funds.used_nano == ALLOWANCE_NANO < full.nano
    return full


#: All but the shortest take their time.
SCENARIOS = [
    pytest.param(one, id=one.name, marks=() if one is WHOLE else pytest.mark.long)
    for one in (WHOLE, STREAMED, BOTH_SOURCES, CUT_SHORT, JOURNALED)
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_request_is_charged_once_at_whichever_await_its_gateway_dies(
    stage: Stage, survivor: Gateway, shared: Place, scenario: Scenario
) -> None:
    calm, *fates = await stage.sweep(scenario)
    awaits = swept_all(scenario, fates)
    await stage.books.leases_over(*(fate.customer for fate in fates))
    full = await costs_as_it_should(stage, scenario, calm)
    lost = [await charged_as_it_was_left(stage, fate, full, stream=scenario.stream) for fate in fates]
    assert "ran out" in survivor.stderr
    await stage.books.verified()

    left = [fate for fate in fates if fate.journal]
    assert bool(left) == scenario.lossy
    if left:
        await replayed(stage, left, shared)
        charges = {await stage.charge_of(fate.customer) for fate in left}
        # What was recorded, and charged when the lease was over, gives way to what it costs.
        assert charges == {full, replace(full, kinds=("expire", "settle"))}
        lost = [0 if fate.journal else tokens for fate, tokens in zip(fates, lost, strict=True)]
        await stage.books.verified()
    assert max(lost) <= (SLICE if scenario.stream else WHOLE_TOKENS)
    of = f"an answer of {calm.made}, {len(fates)} kills at {awaits} awaits"
    measured("gateway killed at every await", max(lost), "tokens", of)
