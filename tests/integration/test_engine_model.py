"""The real scripts on a real store against the plain model of ``tests/engine_model.py``, call by call.

After every step the store's own figures must agree with the model's, and the invariants must hold on what the
store holds, without asking the model.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import Any, Literal, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from gateway.credits import scripts
from gateway.credits.errors import EngineError
from gateway.credits.keyspace import account_key, reservation_id, shard_keys, shard_of
from gateway.credits.scripts import CreditKind, RepeatKey
from gateway.credits.store import Store
from gateway.domain.decision import Reserved, Settlement
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS, FULL_RATE_PPM, Allowance, Plan
from gateway.domain.price import FEMTO_PER_NANO, Cost, cost_of
from gateway.telemetry.metrics import Metrics
from tests.conftest import TimedServer
from tests.engine_invariants import Fold, check_invariants, pairs, read_account, read_postings, read_record, stored
from tests.engine_model import EngineModel, Hold

T = TypeVar("T")

HOUR_MS = 3_600_000
PLANS = {
    plan.name: plan
    for plan in (
        Plan("daily", (Allowance("per_window", 100_000_000, DAY_MS),)),
        Plan("monthly", (Allowance("monthly", 15_000_000_000, DAY_MS),), on_lost="release"),
        Plan("developer", (Allowance("monthly", 150_000_000_000, 8 * HOUR_MS),), rate_ppm=900_000),
        Plan("hourly", (Allowance("per_window", 7, HOUR_MS),), on_lost="charge_hold"),
        Plan("odd", (Allowance("monthly", 1_000_000_007, HOUR_MS),), rate_ppm=333_333, payg=False),
        Plan("huge", (Allowance("monthly", MAX_NANO, 8 * HOUR_MS),), rate_ppm=900_001, on_lost="charge_hold"),
        Plan("closed", (Allowance("per_window", 1_000_003, 12 * HOUR_MS),), payg=False),
        Plan(
            "double",
            (Allowance("monthly", 150_000_000_000, 8 * HOUR_MS), Allowance("per_window", 2_000_000_000, DAY_MS)),
        ),
        Plan(
            "triple",
            (
                Allowance("per_window", 1_000_000_000, DAY_MS),
                Allowance("per_window", 700_000_001, 8 * HOUR_MS),
                Allowance("monthly", 300_000_000_000, HOUR_MS),
            ),
            rate_ppm=700_001,
        ),
        Plan("payg"),
    )
}
#: The same plans as a newer configuration has them: their windows change under the accounts' feet.
NEWER = {
    "daily": replace(PLANS["daily"], allowances=PLANS["double"].allowances),
    "double": replace(PLANS["double"], allowances=PLANS["double"].allowances[1:]),
    "triple": replace(PLANS["triple"], allowances=PLANS["triple"].allowances[::-1]),
    "payg": replace(PLANS["payg"], allowances=PLANS["hourly"].allowances),
    "hourly": replace(PLANS["hourly"], allowances=()),
}


def _neighbour(name: str) -> str:
    """Another account of the same shard: the two share records, leases and ledger."""
    return next(other for i in count() if shard_of(other := f"{name}-{i}") == shard_of(name))


MAIN = "amber"
NEIGHBOUR = _neighbour(MAIN)
ACCOUNTS = [MAIN, NEIGHBOUR, "birch"]
NOBODY = "nobody"
SHARDS = sorted({shard_of(name) for name in (*ACCOUNTS, NOBODY)})
#: Most of what happens happens to one account: only calls that meet each other find anything.
NAMES = st.sampled_from([*[MAIN] * 7, NEIGHBOUR, *ACCOUNTS, NOBODY])


def _ms(*moment: int) -> int:
    return round(datetime(*moment, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc,arg-type]


#: The eve of a month's end, of a leap day, of a new year, and a plain day.
STARTS = [
    _ms(2027, 2, 28, 21, 59, 59),
    _ms(2028, 2, 28, 23, 59),
    _ms(2027, 12, 31, 12),
    _ms(2027, 3, 10, 7, 30),
    _ms(2027, 4, 30, 15, 59),
]
STEPS_MS = [
    1,
    999,
    60_000,
    HOUR_MS - 1,
    HOUR_MS,
    7 * HOUR_MS,
    DAY_MS - 1,
    DAY_MS,
    5 * DAY_MS,
    31 * DAY_MS,
    100 * DAY_MS,
]
BACK_MS = [-1, -60_001, -2 * HOUR_MS, -3 * DAY_MS]

#: Amounts are named here and worked out against the account as it then is, give or take a few femto-credits.
BASES = ["zero", "free", "allowance", "balance", "granted", "third", "third", "tenth", "tenth", "hold", "hold", "most"]
OFF_BY_FEMTO = [0, 0, 0, 1, -1, FEMTO_PER_NANO, -FEMTO_PER_NANO, 1_500_000, 12_345_678_900_001]
AMOUNTS = st.tuples(st.sampled_from(BASES), st.sampled_from(OFF_BY_FEMTO))
LEASES_MS = st.sampled_from([0, 1, 60_000, HOUR_MS, 2 * DAY_MS, 2 * DAY_MS])
#: Which of the reservations or operations made so far, counted from the latest.
BACK = st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 5, 8])
OPERATION_BACK = st.sampled_from([None, None, None, 0, 1, 2])

Verb = Literal["void", "expire", "abandon"]


@dataclass(frozen=True)
class Made:
    """A reservation that was asked for, to ask again or to end."""

    account: str
    id: str
    plan: Plan
    amount: Cost
    minimum_nano: int
    alone_nano: int
    grows: bool
    created_ms: int


class EngineMachine(RuleBasedStateMachine):
    """One store connection and one event loop per example."""

    def __init__(self, valkey: TimedServer) -> None:
        super().__init__()
        self.clock = valkey.clock
        valkey.server.command("FLUSHALL")
        self.loop = asyncio.new_event_loop()
        self.store = Store(valkey.url, 20_000, Metrics(PLANS, ["model"]))
        self.wait(self.store.start())
        self.model = EngineModel()
        self.plans = dict(PLANS)
        self.made: list[Made] = []
        self.operations: list[str] = []
        self.ids = count(1)
        self.last_entry = dict.fromkeys(SHARDS, "0")
        self.folds = {name: Fold() for name in ACCOUNTS}

    def teardown(self) -> None:
        self.wait(self.store.close())
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    # --- one call, twice ----------------------------------------------------------------------------------------

    def wait(self, work: Awaitable[T]) -> T:
        async def done() -> T:
            return await work

        return self.loop.run_until_complete(done())

    def both(self, real: Awaitable[T], expected: Callable[[], T]) -> T | EngineError:
        """Run the real script and the model; they must answer, or refuse, the same."""
        wanted = _outcome(expected)
        got = _outcome(lambda: self.wait(real))
        if isinstance(wanted, EngineError):
            assert type(got) is type(wanted), (got, wanted)
            assert str(wanted) in str(got)
        else:
            assert got == wanted, f"{got!r}\n{wanted!r}"
        self.check()
        return got

    # --- rules --------------------------------------------------------------------------------------------------

    @initialize(
        start=st.sampled_from(STARTS),
        plans=st.lists(st.sampled_from(sorted(PLANS)), min_size=len(ACCOUNTS), max_size=len(ACCOUNTS)),
        balance=st.sampled_from([0, 0, 1, 40_000_000, 10**9, MAX_NANO]),
    )
    def open_accounts(self, start: int, plans: list[str], balance: int) -> None:
        self._set_clock(start)
        for name, plan in zip(ACCOUNTS, plans, strict=True):
            self._create(name, plan)
            self._turn_key(name)
        if balance:
            self._credit(MAIN, self._operation(None), "grant", balance)

    @rule(name=NAMES, amounts=st.lists(AMOUNTS, min_size=1, max_size=3), lease_ms=LEASES_MS)
    def reserve(self, name: str, amounts: list[tuple[str, int]], lease_ms: int) -> None:
        for base, off in amounts:
            key = next(iter(self.model.accounts[name].keys), "") if name in self.model.accounts else ""
            self._reserve(self._new(name, self._plan_of(name), base, off), lease_ms=lease_ms, key=key)

    @rule(
        name=NAMES,
        amount=AMOUNTS,
        skew_ms=st.sampled_from([0, 60_000, -60_000, 60_001, -60_001]),
        key=st.sampled_from(["", "", "good", "bad"]),
        plan=st.sampled_from(["", "", *PLANS]),
    )
    def reserve_oddly(self, name: str, amount: tuple[str, int], skew_ms: int, key: str, plan: str) -> None:
        made = self._new(name, self.plans[plan] if plan else self._plan_of(name), *amount)
        self._reserve(made, lease_ms=60_000, key=key, skew_ms=skew_ms)

    @precondition(lambda self: self.made)
    @rule(back=BACK, change=st.sampled_from(["nothing", "nothing", "amount", "minimum", "account"]))
    def reserve_again(self, back: int, change: str) -> None:
        made = self._made(back)
        if change == "amount":
            made = replace(made, amount=Cost(made.amount.payg_nano // 2 + 1, made.amount.plan_nano))
        elif change == "minimum":
            made = replace(made, minimum_nano=made.minimum_nano // 2 + 1)
        elif change == "account" and made.account in {MAIN, NEIGHBOUR}:  # another shard would not know the id
            made = replace(made, account=NEIGHBOUR if made.account == MAIN else MAIN)
        self._reserve(made, lease_ms=60_000)

    @precondition(lambda self: self.made)
    @rule(backs=st.lists(BACK, min_size=1, max_size=2), amount=AMOUNTS)
    def settle(self, backs: list[int], amount: tuple[str, int]) -> None:
        for back in backs:
            made = self._open(back)
            self._settle(made, made.account, *amount)

    @precondition(lambda self: self.made)
    @rule(back=BACK, name=st.sampled_from([None, *ACCOUNTS, NOBODY]))
    def settle_again_or_as_another(self, back: int, name: str | None) -> None:
        made = self._made(back)
        self._settle(made, name or made.account, "hold", 0)

    @precondition(lambda self: self._has_open())
    @rule(
        later_ms=st.sampled_from([0, 0, 1, HOUR_MS, DAY_MS, 29 * DAY_MS]),
        amount=AMOUNTS,
        back=BACK,
        cost=AMOUNTS,
        plan=st.sampled_from([None, None, *PLANS]),
    )
    def settle_in_a_later_window(
        self, later_ms: int, amount: tuple[str, int], back: int, cost: tuple[str, int], plan: str | None
    ) -> None:
        """What is open is settled after another reservation, or a change of plan, has opened the next window."""
        made = self._open(back)
        name = made.account
        self._set_clock(max(self.model.now_ms, self.model.accounts[name].first_end_ms) + later_ms)
        if plan:
            self._set_plan(name, self._operation(None), 0, plan)
        self._reserve(self._new(name, self._plan_of(name), *amount), lease_ms=2 * DAY_MS)
        self._settle(made, name, *cost)

    @precondition(lambda self: self.made)
    @rule(
        back=BACK,
        verb=st.sampled_from(["void", "abandon", "expire", "expire", "expire"]),
        at_end=st.sampled_from([None, -1, 0, 0]),
    )
    def release(self, back: int, verb: Verb, at_end: int | None) -> None:
        made = self._made(back)
        hold = self._hold(made)
        if verb == "expire" and at_end is not None and hold is not None and hold.state == "open":
            self._set_clock(hold.due_ms + at_end)
        self._release(made.account, made.id, verb)

    @precondition(lambda self: self.made)
    @rule(
        back=BACK,
        wanted=AMOUNTS,
        seen=AMOUNTS,
        lease_ms=LEASES_MS,
        skew_ms=st.sampled_from([0, 0, 0, 60_001]),
        later_ms=st.sampled_from([None, None, None, 0, 1, HOUR_MS]),
        whatever=st.booleans(),
    )
    def extend(
        self,
        back: int,
        wanted: tuple[str, int],
        seen: tuple[str, int],
        lease_ms: int,
        skew_ms: int,
        later_ms: int | None,
        whatever: bool,
    ) -> None:
        """Perhaps in the next window, perhaps one whose lease has run out."""
        made = self._made(back) if whatever else self._open(back)
        account, rate = self.model.accounts[made.account], made.plan.rate_ppm
        if later_ms is not None:
            self._set_clock(max(self.model.now_ms, account.first_end_ms) + later_ms)
        hold = self._hold(made)
        held_femto = hold.covered * FEMTO_PER_NANO if hold else 0
        wanted_femto = min(self._femto(made.account, made.plan, *wanted, hold) + held_femto, MAX_NANO * FEMTO_PER_NANO)
        asked: dict[str, Any] = {
            "plan": self.plans[made.plan.name],
            "wanted": cost_of(wanted_femto, rate),
            "seen": cost_of(self._femto(made.account, made.plan, *seen, hold), rate),
            "seen_note": f"seen {len(self.made)}",
            "lease_ms": lease_ms,
        }
        gateway_ms = self.clock.now_ms() + skew_ms
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "gateway_ms", lambda: gateway_ms)
            self.both(
                scripts.extend(self.store, made.account, made.id, **asked),
                lambda: self.model.extend(made.account, made.id, **asked, gateway_ms=gateway_ms),
            )

    @rule(
        name=NAMES,
        key_hash=st.sampled_from(["a", "b"]),
        body_hash=st.sampled_from(["x", "x", "x", "y"]),
        amount=AMOUNTS,
    )
    def reserve_with_a_key(self, name: str, key_hash: str, body_hash: str, amount: tuple[str, int]) -> None:
        """A client's own idempotency key, perhaps once more."""
        made = self._new(name, self._plan_of(name), *amount)
        self._reserve(made, lease_ms=60_000, repeat=RepeatKey(key_hash, body_hash))

    @precondition(lambda self: self.made)
    @rule(back=BACK, name=st.sampled_from([None, None, None, *ACCOUNTS, NOBODY]), operation=OPERATION_BACK)
    def refund(self, back: int, name: str | None, operation: int | None) -> None:
        made = self._made(back)
        operation_id, name = self._operation(operation), name or made.account
        self.both(
            scripts.refund(self.store, name, operation_id, made.id, "note"),
            lambda: self.model.refund(name, operation_id, made.id, "note"),
        )

    @rule(name=NAMES, amount=AMOUNTS, age_ms=st.sampled_from([0, HOUR_MS - 1, HOUR_MS, 2 * DAY_MS]))
    def settle_what_the_store_has_lost(self, name: str, amount: tuple[str, int], age_ms: int) -> None:
        made = self._new(name, self._plan_of(name), *amount)
        created_ms = self.model.now_ms - age_ms
        self._settle(made, name, *amount, created_ms=created_ms)
        if self._hold(made):
            self.made.append(made)

    @rule(plan=st.sampled_from(sorted(NEWER)))
    def reload(self, plan: str) -> None:
        """The configuration of a plan changes, or changes back."""
        self.plans[plan] = NEWER[plan] if self.plans[plan] is PLANS[plan] else PLANS[plan]

    @rule(shard=st.sampled_from(SHARDS), limit=st.sampled_from([1, 2, 100]))
    def reap(self, shard: int, limit: int) -> None:
        found = self.both(
            scripts.due(self.store, shard, limit), lambda: self.model.due(shard, limit, self.model.now_ms)
        )
        assert not isinstance(found, EngineError)
        for reservation, name in found[1]:
            self._release(name, reservation, "expire")

    @rule(
        name=NAMES,
        kind=st.sampled_from(["grant", "refund", "deduct"]),
        amount=st.sampled_from([0, 1, 999_999_999, 5 * 10**9, MAX_NANO, "room", "spent", "spent+1", "free", "free+1"]),
        back=OPERATION_BACK,
    )
    def credit(self, name: str, kind: CreditKind, amount: int | str, back: int | None) -> None:
        if isinstance(amount, str):
            account = self.model.accounts.get(name)
            refundable = account.totals.spent - account.totals.refunded if account else 0
            room = MAX_NANO - account.balance if account else 0
            free = self.model.balance_free(account) if account else 0
            named = {"room": room, "spent": refundable, "spent+1": refundable + 1, "free": free, "free+1": free + 1}
            amount = named[amount]
        self._credit(name, self._operation(back), kind, min(amount, MAX_NANO))

    @rule(
        name=NAMES,
        plan=st.sampled_from(sorted(PLANS)),
        version=st.sampled_from(["next", "next", "next", "newer", "same", "first"]),
        back=OPERATION_BACK,
        settled=st.none() | st.tuples(BACK, AMOUNTS),
    )
    def set_plan(
        self, name: str, plan: str, version: str, back: int | None, settled: tuple[int, tuple[str, int]] | None
    ) -> None:
        """Perhaps with a settlement right after it: what was held under the old plan stays held."""
        now_at = self.model.accounts[name].plan_version if name in self.model.accounts else 0
        number = {"next": 0, "newer": now_at + 3, "same": now_at, "first": 1}[version]
        self._set_plan(name, self._operation(back), number, plan)
        if settled and self._has_open():
            made = self._open(settled[0])
            self._settle(made, made.account, *settled[1])

    @rule(
        name=NAMES, what=st.sampled_from(["show", "show", "show", "create", "key"]), plan=st.sampled_from(sorted(PLANS))
    )
    def look_or_create_or_turn_key(self, name: str, what: str, plan: str) -> None:
        if what == "show":
            for shown in (self._plan_of(name), self.plans[plan]):
                self._show(name, shown)
        elif name == NOBODY:
            return
        elif what == "create":
            self._create(name, plan)
        else:
            self._turn_key(name)

    @rule(
        by=st.sampled_from([*STEPS_MS, *STEPS_MS, *BACK_MS, "window", "window", "window"]),
        off=st.sampled_from([-1, 0, 1]),
    )
    def move_clock(self, by: int | str, off: int) -> None:
        """By so much, or to about the end of the main account's window."""
        now_ms = self.model.now_ms + by if isinstance(by, int) else self.model.accounts[MAIN].first_end_ms + off
        self._set_clock(now_ms)

    # --- parts of the rules -------------------------------------------------------------------------------------

    def _set_clock(self, now_ms: int) -> None:
        self.clock.freeze_at(now_ms)
        self.model.now_ms = now_ms

    def _plan_of(self, name: str) -> Plan:
        return self.plans[self.model.accounts[name].plan if name in self.model.accounts else "daily"]

    def _femto(self, name: str, plan: Plan, base: str, off: int, hold: Hold | None) -> int:
        """The amount that a base names, in femto-credits of list price."""
        if name not in self.model.accounts:
            return max(0, off)
        account, model = self.model.accounts[name], self.model
        allowance = model.allowance_free(account) * 1_000_000 // plan.rate_ppm
        balance = model.balance_free(account)
        granted = min((win.window.granted_nano for win in account.windows), default=0)
        nano = {
            "zero": 0,
            "free": allowance + balance,
            "allowance": allowance,
            "balance": balance,
            "granted": granted,
            "third": (allowance + balance) // 3,
            "tenth": (allowance + balance) // 10,
            "hold": hold.covered if hold else granted // 4,
            "most": MAX_NANO,
        }[base]
        return min(max(0, nano * FEMTO_PER_NANO + off), MAX_NANO * FEMTO_PER_NANO)

    def _new(self, name: str, plan: Plan, base: str, off: int) -> Made:
        amount = cost_of(self._femto(name, plan, base, off, None), plan.rate_ppm)
        number = next(self.ids)
        minimum = (0, 1, amount.payg_nano // 2, amount.payg_nano)[number % 4]
        minimum = min(minimum, amount.payg_nano)
        alone = minimum if number % 3 else minimum // 2
        return Made(
            name,
            reservation_id(name, f"{number:024x}"),
            plan,
            amount,
            minimum,
            alone,
            number % 2 == 0,
            self.model.now_ms,
        )

    def _made(self, back: int) -> Made:
        return self.made[-1 - back % len(self.made)]

    def _has_open(self) -> bool:
        return any(hold.state == "open" for hold in self.model.holds.values())

    def _open(self, back: int) -> Made:
        """One that is still open, if there is any."""
        still = [made for made in self.made if (hold := self._hold(made)) and hold.state == "open"]
        return still[-1 - back % len(still)] if still else self._made(back)

    def _hold(self, made: Made) -> Hold | None:
        return self.model.holds.get((shard_of(made.account), made.id))

    def _reserve(
        self, made: Made, *, lease_ms: int, key: str = "", skew_ms: int = 0, repeat: RepeatKey | None = None
    ) -> None:
        gateway_ms = self.clock.now_ms() + skew_ms
        asked: dict[str, Any] = {
            "plan": made.plan,
            "amount": made.amount,
            "minimum_nano": made.minimum_nano,
            "alone_nano": made.alone_nano,
            "lease_ms": lease_ms,
            "key_id": key,
            "repeat": repeat,
            "grows": made.grows,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "gateway_ms", lambda: gateway_ms)
            outcome = self.both(
                scripts.reserve(self.store, made.account, made.id, **asked, model="model"),
                lambda: self.model.reserve(made.account, made.id, **asked, gateway_ms=gateway_ms),
            )
        if isinstance(outcome, Reserved) and made not in self.made:
            # A minimum above the amount (changed for a repeat, the first record forgotten) asks for the amount.
            least = min(made.alone_nano, made.amount.payg_nano)
            assert least <= outcome.payg_nano <= made.amount.payg_nano
            self.made.append(made)

    def _settle(self, made: Made, name: str, base: str, off: int, created_ms: int = 0) -> None:
        cost = cost_of(self._femto(name, made.plan, base, off, self._hold(made)), made.plan.rate_ppm)
        said: dict[str, Any] = {
            "plan": made.plan,
            "cost": cost,
            "note": "note",
            "created_ms": created_ms,
            "key_id": "k",
        }
        outcome = self.both(
            scripts.settle(self.store, name, made.id, **said, model="model"),
            lambda: self.model.settle(name, made.id, **said),
        )
        if isinstance(outcome, Settlement) and not outcome.repeated:
            by_allowance = cost.payg_nano - outcome.from_balance_nano - outcome.written_off_nano
            at_rate = -(-by_allowance * made.plan.rate_ppm // FULL_RATE_PPM)
            # Below the full rate, each part is rounded up by itself.
            rounding = 2 if made.plan.rate_ppm < FULL_RATE_PPM else 0
            assert abs(outcome.from_allowance_nano - at_rate) <= rounding

    def _release(self, name: str, reservation: str, verb: Verb) -> None:
        self.both(
            scripts.release(self.store, name, reservation, verb),
            lambda: self.model.release(name, reservation, verb),
        )

    def _create(self, name: str, plan: str) -> None:
        self.both(scripts.create(self.store, name, self.plans[plan]), lambda: self.model.create(name, self.plans[plan]))

    def _show(self, name: str, plan: Plan) -> None:
        self.both(scripts.show(self.store, name, plan), lambda: self.model.show(name, plan))

    def _operation(self, back: int | None) -> str:
        if back is not None and self.operations:
            return self.operations[-1 - back % len(self.operations)]
        self.operations.append(f"op_{next(self.ids)}")
        return self.operations[-1]

    def _credit(self, name: str, operation: str, kind: CreditKind, amount: int) -> None:
        self.both(
            scripts.credit(self.store, name, operation, kind, amount, "why"),
            lambda: self.model.credit(name, operation, kind, amount, "why"),
        )

    def _set_plan(self, name: str, operation: str, version: int, plan: str) -> None:
        self.both(
            scripts.set_plan(self.store, name, operation, version, self.plans[plan]),
            lambda: self.model.set_plan(name, operation, version, self.plans[plan]),
        )

    def _turn_key(self, name: str) -> None:
        """Make the account's key, or revoke it."""
        keys, key = self.model.accounts[name].keys, account_key(name)
        self.wait(self.store.call("HDEL", key, "k:good") if keys else self.store.call("HSET", key, "k:good", "0|"))
        keys ^= {"good"}

    # --- what the store holds -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Read the live store and hold it against the model and against the invariants."""
        accounts, records, entries = self.wait(self._read())
        self._check_ledger(entries)
        for name, values in accounts.items():
            mine = [record for record in records.values() if record["account"] == name]
            check_invariants(values, mine, self.model.accounts[name].lowered, self.folds[name])
            assert values == stored(self.model, self.model.accounts[name])
        assert {(at, id_): record["state"] for (at, id_), record in records.items()} == {
            key: hold.state for key, hold in self.model.holds.items()
        }

    async def _read(self) -> tuple[dict[str, Any], dict[tuple[int, str], Any], dict[int, list[Any]]]:
        names = list(self.model.accounts)
        call = self.store.call
        replies = await asyncio.gather(
            *(call("HGETALL", account_key(name)) for name in names),
            *(call("HGETALL", shard_keys(shard).records) for shard in SHARDS),
            *(call("XRANGE", shard_keys(shard).ledger, f"({self.last_entry[shard]}", "+") for shard in SHARDS),
        )
        accounts = {name: read_account(reply) for name, reply in zip(names, replies, strict=False)}
        shards = dict(zip(SHARDS, replies[len(names) :], strict=False))
        records = {
            (shard, id_): read_record(text)
            for shard, reply in shards.items()
            for id_, text in pairs(reply).items()
            if id_.startswith("rsv_")
        }
        return accounts, records, dict(zip(SHARDS, replies[len(names) + len(SHARDS) :], strict=True))

    def _check_ledger(self, new: dict[int, list[Any]]) -> None:
        expected, self.model.ledger = self.model.ledger, []
        for shard, found in new.items():
            entries = [pairs(fields) for _, fields in found]
            for entry in entries:
                self.folds[entry["account"]].add(entry)
            entries = [entry | {"postings": _sorted_postings(entry["postings"])} for entry in entries]
            assert entries == [entry for entry in expected if shard_of(entry["account"]) == shard]
            if found:
                self.last_entry[shard] = found[-1][0].decode()


def _sorted_postings(text: str) -> str:
    return " ".join(sorted(f"{book}={nano}" for book, nano in read_postings(text).items()))


def _outcome(call: Callable[[], T]) -> T | EngineError:
    try:
        return call()
    except EngineError as error:
        return error


def _run(valkey: TimedServer, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        cast(type[RuleBasedStateMachine], lambda: EngineMachine(valkey)),  # it only calls it
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,  # the gate must not fail by chance: a new example is looked for on purpose
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(600)  # a failure is made small before it is shown
def test_the_scripts_answer_as_the_model_does(valkey: TimedServer) -> None:
    _run(valkey, 200, 50)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_scripts_answer_as_the_model_does_for_minutes(valkey: TimedServer) -> None:
    _run(valkey, 1000, 50)
