"""One process of the bank test: ``python -m tests.faults.bank_worker URL DIRECTORY SEED``, until it is killed.

It does at random all that can be done to an account, and writes down what it is about to do, a line of JSON each, so
that whoever killed it can tell what may have happened.
"""

import asyncio
import json
import os
import random
import secrets
import sys
from pathlib import Path

from gateway.credits.errors import EngineError, StoreError
from gateway.credits.journal import Journal
from gateway.credits.keyspace import SHARDS, reservation_id
from gateway.credits.operator import Operator
from gateway.credits.scripts import CreditKind
from gateway.credits.service import CreditEngine, Identity, Reservation, Seen
from gateway.credits.store import Store
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import FEMTO_PER_NANO, cost_of
from gateway.telemetry.metrics import Metrics

ACCOUNTS = [f"account-{number}" for number in range(50)]
PLANS = {
    plan.name: plan
    for plan in (
        Plan("prepaid"),
        Plan("daily", (Allowance("per_window", 2_000_000, DAY_MS),)),
        Plan("both", (Allowance("per_window", 1_000_000, DAY_MS // 24), Allowance("monthly", 90_000_000, DAY_MS))),
        Plan("cheaper", (Allowance("per_window", 3_000_000, DAY_MS // 3),), rate_ppm=900_000),
        Plan("release", (Allowance("per_window", 2_000_000, DAY_MS),), on_lost="release"),
    )
}
_MOST_NANO = 300_000
_AT_ONCE = 4
_MOST_LIVE = 10


class Worker:
    """Does one thing after the other; several of these in one process share engine and diary."""

    def __init__(self, engine: CreditEngine, operator: Operator, diary: int, seed: str) -> None:
        self._engine = engine
        self._operator = operator
        self._diary = diary
        self._random = random.Random(seed)
        self._live: list[Reservation] = []
        self._ended: list[Reservation] = []

    async def work(self) -> None:
        """For ever."""
        steps = [self._reserve] * 6 + [self._extend] * 4 + [self._settle] * 4 + [self._void, self._credit, self._credit]
        steps += [self._expire, self._refund, self._change_plan]
        while True:
            try:
                await self._random.choice(steps)()
            except (StoreError, EngineError):
                continue  # refused, or under way in the background

    def _say(self, what: str, **facts: object) -> None:
        os.write(self._diary, json.dumps({"what": what, **facts}).encode() + b"\n")

    def _nano(self) -> int:
        return self._random.randint(1, _MOST_NANO)

    async def _reserve(self) -> None:
        if len(self._live) >= _MOST_LIVE:
            return
        account, request, nano = self._random.choice(ACCOUNTS), secrets.token_hex(12), self._nano()
        self._say("reserve", id=reservation_id(account, request))
        least = self._random.randint(1, nano) * FEMTO_PER_NANO
        outcome = await self._engine.reserve(Identity(account, ""), request, "model", nano * FEMTO_PER_NANO, least)
        if isinstance(outcome, Reservation):
            self._live.append(outcome)

    def _some(self, reservations: list[Reservation]) -> Reservation | None:
        return self._random.choice(reservations) if reservations else None

    def _take(self) -> Reservation | None:
        if not self._live:
            return None
        taken = self._live.pop(self._random.randrange(len(self._live)))
        self._ended.append(taken)
        return taken

    async def _extend(self) -> None:
        if one := self._some(self._live):
            seen = one.seen.cost_femto // FEMTO_PER_NANO + self._nano() // 10
            self._say("seen", id=one.id, nano=seen)
            await self._engine.extend(one, self._nano() * 2 * FEMTO_PER_NANO, Seen(seen * FEMTO_PER_NANO, "{}"))

    async def _settle(self) -> None:
        if one := self._take():
            nano = self._nano()
            cost = cost_of(nano * FEMTO_PER_NANO, one.plan.rate_ppm)
            self._say("settle", id=one.id, most=cost.payg_nano, least=cost.plan_nano)
            await self._engine.settle(one, nano * FEMTO_PER_NANO, "{}")

    async def _void(self) -> None:
        if one := self._take():
            self._say("void", id=one.id)
            await self._engine.void(one)

    async def _credit(self) -> None:
        kinds: tuple[CreditKind, ...] = ("grant", "grant", "deduct", "refund")
        account, kind, nano = self._random.choice(ACCOUNTS), self._random.choice(kinds), self._nano() * 2
        operation = f"op-{secrets.token_hex(8)}"
        self._say(kind, id=operation, account=account, nano=nano)
        await self._operator.credit(account, nano, kind, operation)
        self._say("credited", id=operation)

    async def _expire(self) -> None:
        await asyncio.gather(*(self._engine.expire_due(shard) for shard in range(SHARDS)))

    async def _refund(self) -> None:
        if one := self._some(self._ended):
            self._say("refund_request", id=one.id)
            await self._operator.refund_request(one.account, one.id, f"op-{secrets.token_hex(8)}")

    async def _change_plan(self) -> None:
        await self._operator.set_plan(self._random.choice(ACCOUNTS), self._random.choice(list(PLANS)))


async def main(url: str, directory: Path, seed: str) -> None:
    """Work until killed."""
    metrics = Metrics(PLANS, ["model"])
    store = Store(url, 5000, metrics)
    await store.start()
    journal = Journal(directory / "journal")
    await journal.open()
    engine = CreditEngine(store, PLANS, "prepaid", metrics, journal)
    await engine.replay()
    diary = os.open(directory / f"diary-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    operator = Operator(store, PLANS, "prepaid")
    await asyncio.gather(*(Worker(engine, operator, diary, f"{seed} {n}").work() for n in range(_AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
