"""The real scripts on a real store against the plain model of ``tests/engine_model.py``, call by call.

After every step the store's own figures must agree with the model's, and the invariants must hold on what the
store holds, without asking the model.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from gateway.credits import scripts
from gateway.credits.errors import EngineError
from gateway.credits.keyspace import account_key, reservation_id, shard_keys, shard_of
from gateway.credits.scripts import NotReserved
from gateway.credits.store import Store
from gateway.domain.decision import Reserved, Settlement
from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import FEMTO_PER_NANO, Cost, cost_of
from gateway.telemetry.metrics import Metrics
from tests.conftest import TimedServer
from tests.engine_model import Account, EngineModel, Hold

T = TypeVar("T")

HOUR_MS = 3_600_000
PLANS = {
    plan.name: plan
    for plan in (
        Plan("daily", Allowance("per_window", 100_000_000, DAY_MS)),
        Plan("monthly", Allowance("monthly", 15_000_000_000, DAY_MS)),
        Plan("developer", Allowance("monthly", 150_000_000_000, 8 * HOUR_MS), rate_ppm=900_000),
        Plan("hourly", Allowance("per_window", 7, HOUR_MS)),
        Plan("odd", Allowance("monthly", 1_000_000_007, HOUR_MS), rate_ppm=333_333, payg=False),
        Plan("huge", Allowance("monthly", MAX_NANO, 8 * HOUR_MS), rate_ppm=900_001),
        Plan("payg", None),
    )
}


def _neighbour(name: str) -> str:
    """Another account of the same shard: the two share records, leases and ledger."""
    return next(other for i in count() if shard_of(other := f"{name}-{i}") == shard_of(name))


ACCOUNTS = {
    "amber": "developer",
    _neighbour("amber"): "daily",
    "birch": "monthly",
    "cedar": "hourly",
    "dune": "odd",
    "ember": "payg",
    "flint": "huge",
}
NOBODY = "nobody"
SHARDS = sorted({shard_of(name) for name in (*ACCOUNTS, NOBODY)})


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
STEPS_MS = [1, 999, 60_000, HOUR_MS - 1, HOUR_MS, 7 * HOUR_MS, DAY_MS - 1, DAY_MS, 5 * DAY_MS, 31 * DAY_MS, 100 * DAY_MS]
BACK_MS = [-1, -60_001, -2 * HOUR_MS, -3 * DAY_MS]

#: Amounts are named here and worked out against the account as it then is.
BASES = ["zero", "free", "free", "allowance", "balance", "granted", "third", "tenth", "hold", "hold", "most"]
OFF_BY_FEMTO = [0, 0, 0, 1, -1, FEMTO_PER_NANO, -FEMTO_PER_NANO, 1_500_000, 12_345_678_900_001]


@dataclass
class Made:
    """A reservation that was asked for, to ask again or to end."""

    account: str
    id: str
    plan: Plan
    amount: Cost
    minimum_nano: int


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
            assert got == wanted
        self.check()
        return got

    def plan_of(self, name: str) -> Plan:
        return PLANS[self.model.accounts[name].plan] if name in self.model.accounts else PLANS["daily"]

    def femto(self, name: str, plan: Plan, base: str, off: int, hold: Hold | None = None) -> int:
        """The amount that a base names, in femto-credits of list price."""
        if name not in self.model.accounts:
            return max(0, off)
        account, model = self.model.accounts[name], self.model
        allowance = model.allowance_free(account) * 1_000_000 // plan.rate_ppm
        balance = model.balance_free(account)
        nano = {
            "zero": 0,
            "free": allowance + balance,
            "allowance": allowance,
            "balance": balance,
            "granted": account.window.granted_nano,
            "third": (allowance + balance) // 3,
            "tenth": (allowance + balance) // 10,
            "hold": hold.covered if hold else 1,
            "most": MAX_NANO,
        }[base]
        return min(max(0, nano * FEMTO_PER_NANO + off), MAX_NANO * FEMTO_PER_NANO)

    # --- rules --------------------------------------------------------------------------------------------------

    @initialize(start=st.sampled_from(STARTS), balances=st.lists(st.sampled_from([0, 1, 10**9, MAX_NANO]), min_size=7))
    def open_accounts(self, start: int, balances: list[int]) -> None:
        self.clock.freeze_at(start)
        self.model.now_ms = start
        for (name, plan), balance in zip(ACCOUNTS.items(), balances, strict=False):
            self.both(scripts.create(self.store, name, PLANS[plan]), lambda: self.model.create(name, PLANS[plan]))
            if balance:
                self._credit(name, f"op_{next(self.ids)}", "grant", balance)
            self._set_key(name, "good")

    @rule(name=st.sampled_from([*ACCOUNTS, NOBODY]), plan=st.sampled_from(sorted(PLANS)))
    def create_again(self, name: str, plan: str) -> None:
        if name in self.model.accounts:  # nobody must stay nobody
            self.both(scripts.create(self.store, name, PLANS[plan]), lambda: self.model.create(name, PLANS[plan]))

    @rule(
        name=st.sampled_from([*ACCOUNTS, *ACCOUNTS, NOBODY]),
        base=st.sampled_from(BASES),
        off=st.sampled_from(OFF_BY_FEMTO),
        least=st.sampled_from(["zero", "one", "half", "all"]),
        lease_ms=st.sampled_from([0, 1, 60_000, HOUR_MS, 2 * DAY_MS]),
        skew_ms=st.sampled_from([0, 0, 0, 60_000, -60_000, 60_001, -60_001]),
        key=st.sampled_from(["", "good", "good", "bad"]),
        other_plan=st.sampled_from([None, None, None, None, *PLANS]),
    )
    def reserve(
        self, name: str, base: str, off: int, least: str, lease_ms: int, skew_ms: int, key: str, other_plan: str | None
    ) -> None:
        plan = PLANS[other_plan] if other_plan else self.plan_of(name)
        amount = cost_of(self.femto(name, plan, base, off), plan.rate_ppm)
        minimum = {"zero": 0, "one": 1, "half": amount.payg_nano // 2, "all": amount.payg_nano}[least]
        made = Made(name, reservation_id(name, f"{next(self.ids):024x}"), plan, amount, min(minimum, amount.payg_nano))
        outcome = self._reserve(made, name, lease_ms, skew_ms, key)
        if isinstance(outcome, Reserved):
            assert made.minimum_nano <= outcome.payg_nano <= amount.payg_nano
            self.made.append(made)

    @precondition(lambda self: self.made)
    @rule(back=st.integers(0, 40), change=st.sampled_from(["nothing", "nothing", "amount", "minimum", "account"]))
    def reserve_again(self, back: int, change: str) -> None:
        made = self.made[-1 - back % len(self.made)]
        name, amount, minimum = made.account, made.amount, made.minimum_nano
        if change == "amount":
            amount = Cost(amount.payg_nano + 1, amount.plan_nano + 1) if amount.payg_nano < MAX_NANO else Cost(0, 0)
        elif change == "minimum":
            minimum = minimum + 1 if minimum < MAX_NANO else 0
        elif change == "account":
            name = next((n for n in ACCOUNTS if n != name and shard_of(n) == shard_of(name)), name)
        changed = Made(name, made.id, self.plan_of(name), amount, minimum)
        if change != "account" or (shard_of(name), made.id) in self.model.holds:
            outcome = self._reserve(changed, name, 60_000, 0, "")
            if isinstance(outcome, Reserved) and changed not in self.made:
                self.made.append(changed)

    @precondition(lambda self: self.made)
    @rule(
        back=st.integers(0, 40),
        base=st.sampled_from(BASES),
        off=st.sampled_from(OFF_BY_FEMTO),
        stranger=st.sampled_from([None, None, None, None, None, NOBODY, *ACCOUNTS]),
    )
    def settle(self, back: int, base: str, off: int, stranger: str | None) -> None:
        made = self.made[-1 - back % len(self.made)]
        name = stranger or made.account
        hold = self.model.holds.get((shard_of(made.account), made.id))
        cost = cost_of(self.femto(name, made.plan, base, off, hold), made.plan.rate_ppm)
        again = hold is not None and hold.state == "settled"
        outcome = self.both(
            scripts.settle(self.store, name, made.id, plan=made.plan, cost=cost, note="n"),
            lambda: self.model.settle(name, made.id, plan=made.plan, cost=cost, note="n"),
        )
        if isinstance(outcome, Settlement) and outcome.state == "settled" and not again:
            by_allowance = cost.payg_nano - outcome.from_balance_nano - outcome.written_off_nano
            # Each part of a cost is rounded up to a nano-credit by itself; at the full rate nothing is.
            off = outcome.from_allowance_nano - -(-by_allowance * made.plan.rate_ppm // 10**6)
            assert -1 <= off <= 1 if made.plan.rate_ppm != 10**6 else off == 0

    @precondition(lambda self: self.made)
    @rule(
        back=st.integers(0, 40),
        verb=st.sampled_from(["void", "expire", "expire"]),
        at_end=st.sampled_from([None, -1, 0]),
    )
    def release(self, back: int, verb: Any, at_end: int | None) -> None:
        made = self.made[-1 - back % len(self.made)]
        hold = self.model.holds.get((shard_of(made.account), made.id))
        if at_end is not None and hold is not None and hold.state == "open":
            self._set_clock(hold.due_ms + at_end)
        self.both(
            scripts.release(self.store, made.account, made.id, verb),
            lambda: self.model.release(made.account, made.id, verb),
        )

    @rule(shard=st.sampled_from(SHARDS), limit=st.sampled_from([1, 2, 100]))
    def reap(self, shard: int, limit: int) -> None:
        found = self.both(scripts.due(self.store, shard, limit), lambda: self.model.due(shard, limit))
        assert not isinstance(found, EngineError)
        for reservation, name in found[1]:
            self.both(
                scripts.release(self.store, name, reservation, "expire"),
                lambda: self.model.release(name, reservation, "expire"),  # noqa: B023 - called at once
            )

    @rule(
        name=st.sampled_from([*ACCOUNTS, NOBODY]),
        kind=st.sampled_from(["grant", "refund"]),
        amount=st.sampled_from([0, 1, 999_999_999, 5 * 10**9, MAX_NANO, "room", "spent", "spent+1"]),
        back=st.sampled_from([None, None, 0, 1, 2, 5]),
    )
    def credit(self, name: str, kind: Any, amount: int | str, back: int | None) -> None:
        if isinstance(amount, str):
            account = self.model.accounts.get(name)
            totals = account.totals if account else None
            refundable = totals.spent - totals.refunded if totals else 0
            room = MAX_NANO - account.balance if account else 0
            amount = {"room": room, "spent": refundable, "spent+1": refundable + 1}[amount]
        self._credit(name, self._operation(back), kind, min(amount, MAX_NANO))

    @rule(
        name=st.sampled_from([*ACCOUNTS, NOBODY]),
        plan=st.sampled_from(sorted(PLANS)),
        version=st.sampled_from(["next", "next", "next", "newer", "same", "first"]),
        back=st.sampled_from([None, None, None, 0, 1, 2]),
    )
    def set_plan(self, name: str, plan: str, version: str, back: int | None) -> None:
        now_at = self.model.accounts[name].plan_version if name in self.model.accounts else 0
        number = {"next": 0, "newer": now_at + 3, "same": now_at, "first": 1}[version]
        operation = self._operation(back)
        self.both(
            scripts.set_plan(self.store, name, operation, number, PLANS[plan]),
            lambda: self.model.set_plan(name, operation, number, PLANS[plan]),
        )

    @rule(name=st.sampled_from([*ACCOUNTS, NOBODY]), other_plan=st.sampled_from([None, None, *PLANS]))
    def show(self, name: str, other_plan: str | None) -> None:
        plan = PLANS[other_plan] if other_plan else self.plan_of(name)
        self.both(scripts.show(self.store, name, plan), lambda: self.model.show(name, plan))

    @rule(name=st.sampled_from(list(ACCOUNTS)))
    def revoke_or_make_key(self, name: str) -> None:
        self._set_key(name, "good")

    @rule(by_ms=st.sampled_from(STEPS_MS))
    def time_passes(self, by_ms: int) -> None:
        self._set_clock(self.model.now_ms + by_ms)

    @rule(by_ms=st.sampled_from(BACK_MS))
    def time_runs_backwards(self, by_ms: int) -> None:
        self._set_clock(self.model.now_ms + by_ms)

    @rule(name=st.sampled_from(list(ACCOUNTS)), off=st.sampled_from([-1, 0, 1]))
    def window_ends(self, name: str, off: int) -> None:
        self._set_clock(self.model.accounts[name].window.end_ms + off)

    # --- parts of the rules -------------------------------------------------------------------------------------

    def _set_clock(self, now_ms: int) -> None:
        self.clock.freeze_at(now_ms)
        self.model.now_ms = now_ms

    def _operation(self, back: int | None) -> str:
        if back is not None and self.operations:
            return self.operations[-1 - back % len(self.operations)]
        self.operations.append(f"op_{next(self.ids)}")
        return self.operations[-1]

    def _set_key(self, name: str, key: str) -> None:
        keys = self.model.accounts[name].keys
        if key in keys:
            self.wait(self.store.call("HDEL", account_key(name), f"k:{key}"))
        else:
            self.wait(self.store.call("HSET", account_key(name), f"k:{key}", "0|"))
        keys ^= {key}

    def _credit(self, name: str, operation: str, kind: Any, amount: int) -> None:
        self.both(
            scripts.credit(self.store, name, operation, kind, amount, "why"),
            lambda: self.model.credit(name, operation, kind, amount, "why"),
        )

    def _reserve(
        self, made: Made, name: str, lease_ms: int, skew_ms: int, key: str
    ) -> Reserved | NotReserved | EngineError:
        gateway_ms = self.clock.now_ms() + skew_ms
        asked: dict[str, Any] = {
            "plan": made.plan,
            "amount": made.amount,
            "minimum_nano": made.minimum_nano,
            "lease_ms": lease_ms,
            "key_id": key,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "_gateway_ms", lambda: gateway_ms)
            return self.both(
                scripts.reserve(self.store, name, made.id, **asked, model="model"),
                lambda: self.model.reserve(name, made.id, **asked, gateway_ms=gateway_ms),
            )

    # --- what the store holds -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Read the live store and hold it against the model and against the invariants."""
        accounts, records, entries = self.wait(self._read())
        self._check_ledger(entries)
        for name, values in accounts.items():
            mine = [record for record in records.values() if record["account"] == name]
            check_invariants(values, mine, self.model.accounts[name].lowered, self.folds[name])
            assert values == _stored(self.model, self.model.accounts[name])
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
        none = dict.fromkeys((f"total_{name}" for name in _TOTALS), "0")
        accounts = {name: none | _texts(reply) for name, reply in zip(names, replies, strict=False)}
        shards = dict(zip(SHARDS, replies[len(names) :], strict=False))
        records = {
            (shard, id_): _record(text)
            for shard, reply in shards.items()
            for id_, text in _texts(reply).items()
            if id_.startswith("rsv_")
        }
        return accounts, records, dict(zip(SHARDS, replies[len(names) + len(SHARDS) :], strict=True))

    def _check_ledger(self, new: dict[int, list[Any]]) -> None:
        expected, self.model.ledger = self.model.ledger, []
        for shard, found in new.items():
            entries = [_texts(fields) for _, fields in found]
            assert entries == [entry for entry in expected if shard_of(entry["account"]) == shard]
            for entry in entries:
                self.folds[entry["account"]].add(entry)
            if found:
                self.last_entry[shard] = found[-1][0].decode()


class Fold:
    """The ledger of one account, added up from its entries alone."""

    def __init__(self) -> None:
        self.sequence = 0
        self.used = 0
        self.granted = 0
        self.plan = ""
        self.sums = dict.fromkeys(("granted", "lapsed", "allowance", "balance", "written_off"), 0)

    def add(self, entry: dict[str, str]) -> None:
        assert int(entry["sequence"]) == self.sequence + 1, "the sequence has a gap"
        self.sequence += 1
        for name in self.sums:
            self.sums[name] += int(entry.get(name, "0"))
        used, granted = int(entry["used_after"]), int(entry.get("granted", "0"))
        if entry["kind"] == "refresh":
            self.granted = granted + used
        elif entry["kind"] == "plan":
            self.granted += granted + used - self.used
        elif entry["kind"] == "settle":
            assert 0 <= used - self.used <= int(entry.get("allowance", "0"))
        else:
            assert used == self.used
        self.used = used
        self.plan = entry.get("plan", self.plan)
        assert int(entry["balance_after"]) == self.sums["balance"]


def check_invariants(values: dict[str, str], records: list[dict[str, Any]], lowered: bool, fold: Fold) -> None:
    """Invariants 1 to 6 of the engine, on the account hash, the records and the ledger as the store holds them."""
    number = {name: int(value) for name, value in values.items() if name != "plan" and not name.startswith("k:")}
    total = {name: number.get(f"total_{name}", 0) for name in _TOTALS}
    granted, used, held, before = (number[name] for name in ("granted", "used", "held", "held_before"))
    balance, balance_held = number["balance"], number["balance_held"]
    holding = [record for record in records if record["state"] == "open"]
    current = [record["from_allowance"] for record in holding if record["epoch"] == number["epoch"]]
    earlier = [record["from_allowance"] for record in holding if record["epoch"] < number["epoch"]]

    assert min(used, held, before, balance_held) >= 0
    assert balance_held <= balance
    assert used + held <= granted or lowered
    assert balance == total["bought"] + total["refunded"] - total["spent"]
    assert held == sum(current)
    assert before == sum(earlier)
    assert balance_held == sum(record["from_balance"] for record in holding)
    assert total["granted"] == total["used"] + total["lapsed"] + (granted - used - held) + held + before
    assert (fold.sequence, fold.plan) == (number["sequence"], values["plan"])
    assert (fold.used, fold.granted, fold.sums["balance"]) == (used, granted, balance)
    assert (fold.sums["granted"], fold.sums["allowance"]) == (total["granted"], total["used"])
    assert (fold.sums["lapsed"], fold.sums["written_off"]) == (total["lapsed"], total["written_off"])


_TOTALS = ("granted", "used", "lapsed", "bought", "refunded", "spent", "written_off")


def _stored(model: EngineModel, account: Account) -> dict[str, str]:
    """The account hash as the model says it must be."""
    window = account.window
    numbers = {
        "plan_version": account.plan_version,
        "refresh": window.end_ms - window.start_ms,
        "window_end": window.end_ms,
        "granted": window.granted_nano,
        "used": account.used,
        "used_today": account.used_earlier,
        "held": model.held(account),
        "held_before": model.held_before(account),
        "balance": account.balance,
        "balance_held": model.balance_held(account),
        "epoch": account.epoch,
        "sequence": account.sequence,
        "seen": account.seen_ms,
    }
    sums = {f"total_{name}": getattr(account.totals, name) for name in _TOTALS}
    return {name: str(value) for name, value in (numbers | sums).items()} | {
        "plan": account.plan,
        **{f"k:{key}": "0|" for key in account.keys},
    }


def _outcome(call: Callable[[], T]) -> T | EngineError:
    try:
        return call()
    except EngineError as error:
        return error


def _texts(flat: list[bytes]) -> dict[str, str]:
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _record(text: str) -> dict[str, Any]:
    parts = text.split("|")
    if parts[0] in {"settled", "voided"}:
        return {"state": parts[0], "account": parts[1]}
    return {
        "state": parts[0],
        "account": parts[1],
        "epoch": int(parts[2]),
        "from_allowance": int(parts[3]),
        "from_balance": int(parts[4]),
    }


def _run(valkey: TimedServer, examples: int, steps: int, *, derandomize: bool) -> None:
    run_state_machine_as_test(
        lambda: EngineMachine(valkey),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_scripts_answer_as_the_model_does(valkey: TimedServer) -> None:
    _run(valkey, 60, 40, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_scripts_answer_as_the_model_does_for_minutes(valkey: TimedServer) -> None:
    _run(valkey, 1500, 50, derandomize=False)
