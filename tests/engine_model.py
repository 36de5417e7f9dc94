"""The credit engine in plain Python: what every script must answer, and what the store must then hold.

Nothing is kept here that can be derived: what is held is the sum over the open reservations, a balance is what
came in less what was spent. The engine keeps running figures instead, and both must agree after every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from gateway.credits.errors import OperationConflict, Rejected, UnknownAccount, UnknownReservation
from gateway.credits.keyspace import shard_of
from gateway.credits.scripts import NotReserved
from gateway.domain.decision import Funds, Reserved, Settlement
from gateway.domain.money import MAX_NANO, format_credits
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.domain.window import Window, window_at

MAX_SKEW_MS = 60_000
RESERVATION_RETENTION_MS = DAY_MS
OPERATION_RETENTION_MS = 90 * DAY_MS

Entry = dict[str, str]


@dataclass
class Totals:
    """Lifetime sums, nano."""

    granted: int = 0
    used: int = 0
    lapsed: int = 0
    bought: int = 0
    refunded: int = 0
    spent: int = 0
    written_off: int = 0


@dataclass
class Account:
    """used_earlier: used today in windows before the current one. epoch: windows opened so far."""

    name: str
    plan: str
    window: Window
    used: int = 0
    used_earlier: int = 0
    plan_version: int = 0
    epoch: int = 1
    sequence: int = 0
    seen_ms: int = 0
    lowered: bool = False
    totals: Totals = field(default_factory=Totals)
    keys: set[str] = field(default_factory=set)

    @property
    def balance(self) -> int:
        """Prepaid credits, those held included."""
        return self.totals.bought + self.totals.refunded - self.totals.spent


@dataclass
class Hold:
    """A reservation. due_ms: its lease's end while open, afterwards when it may be forgotten."""

    account: str
    epoch: int
    from_allowance: int
    from_balance: int
    covered: int
    rate_ppm: int
    payg: bool
    asked: tuple[Cost, int]
    due_ms: int
    state: Literal["open", "expired", "settled", "voided"] = "open"
    paid: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Operation:
    """A grant, refund or plan change that was done."""

    what: tuple[object, ...]
    due_ms: int


class EngineModel:
    """All accounts. now_ms is the store's clock. Every method answers and raises what its namesake in
    ``gateway.credits.scripts`` does; a Rejected here carries only the figure that the real text must contain."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.accounts: dict[str, Account] = {}
        self.holds: dict[tuple[int, str], Hold] = {}
        self.operations: dict[tuple[str, str], Operation] = {}
        self.ledger: list[Entry] = []

    # --- what follows from the reservations ---------------------------------------------------------------------

    def open_holds(self, account: Account) -> Iterator[Hold]:
        """The account's open reservations."""
        return (hold for hold in self.holds.values() if hold.account == account.name and hold.state == "open")

    def held(self, account: Account) -> int:
        """Allowance held in the current window."""
        return sum(hold.from_allowance for hold in self.open_holds(account) if hold.epoch == account.epoch)

    def held_before(self, account: Account) -> int:
        """Allowance held by reservations of earlier windows."""
        return sum(hold.from_allowance for hold in self.open_holds(account) if hold.epoch != account.epoch)

    def balance_held(self, account: Account) -> int:
        """Prepaid credits held."""
        return sum(hold.from_balance for hold in self.open_holds(account))

    def allowance_free(self, account: Account) -> int:
        """What the current window can still give."""
        return max(0, account.window.granted_nano - account.used - self.held(account))

    def balance_free(self, account: Account) -> int:
        """Prepaid credits that nothing holds."""
        return account.balance - self.balance_held(account)

    # --- scripts ------------------------------------------------------------------------------------------------

    def create(self, name: str, plan: Plan) -> Funds:
        """Open an account."""
        if name in self.accounts:
            raise Rejected(f"on plan {self.accounts[name].plan!r}")
        account = self.accounts[name] = Account(name, plan.name, _window(plan, self.now_ms))
        account.seen_ms = self.now_ms
        account.totals.granted = account.window.granted_nano
        self._enter(account, "open", name, plan=plan.name)
        self._enter_refresh(account, account.window.granted_nano, 0)
        return self._funds(account, plan)

    def show(self, name: str, plan: Plan) -> Funds | str:
        """Funds in the window of now, or the plan's name if it is another one."""
        account = self._account(name)
        if account.plan != plan.name:
            return account.plan
        return self._funds_now(account, plan)

    def reserve(
        self,
        name: str,
        reservation: str,
        *,
        plan: Plan,
        amount: Cost,
        minimum_nano: int,
        lease_ms: int,
        key_id: str,
        gateway_ms: int,
    ) -> Reserved | NotReserved:
        """Hold credits."""
        account = self.accounts.get(name)
        if account is None:
            return NotReserved("unknown_account")
        asked = (amount, minimum_nano)
        if earlier := self.holds.get((shard_of(name), reservation)):
            return self._reserve_again(account, reservation, earlier, plan, asked)
        if key_id and key_id not in account.keys:
            return NotReserved("unknown_key")
        if account.plan != plan.name:
            return NotReserved("other_plan", account.plan)
        now = self._time(account)
        if now >= account.window.end_ms and abs(self.now_ms - gateway_ms) > MAX_SKEW_MS:
            return NotReserved("skewed")

        rolled, lapsed = self._rolled(account, plan)
        free, balance = self.allowance_free(rolled), self.balance_free(rolled) if plan.payg else 0
        if amount.plan_nano <= free:
            from_allowance, from_balance, covered = amount.plan_nano, 0, amount.payg_nano
        else:
            # Callers derive both amounts from one cost; whatever they give, the balance never pays a negative rest.
            by_allowance = min(amount.payg_nano, _at_list_price(free, plan.rate_ppm))
            from_allowance, from_balance = free, min(balance, amount.payg_nano - by_allowance)
            covered = by_allowance + from_balance
            if covered < minimum_nano:
                return NotReserved("denied", plan.name, self._funds(rolled, plan))

        self._commit_roll(account, rolled, lapsed)
        rolled.seen_ms = now
        self.holds[shard_of(name), reservation] = Hold(
            name, rolled.epoch, from_allowance, from_balance, covered, plan.rate_ppm, plan.payg, asked, now + lease_ms
        )
        return Reserved(reservation, covered, from_allowance, from_balance, self._funds(rolled, plan))

    def _reserve_again(
        self, account: Account, reservation: str, earlier: Hold, plan: Plan, asked: tuple[Cost, int]
    ) -> Reserved | NotReserved:
        if earlier.account != account.name:
            return NotReserved("conflict")
        if earlier.state != "open":
            return NotReserved("ended")
        if earlier.asked != asked:
            return NotReserved("conflict")
        funds = self._funds(account, plan)
        return Reserved(reservation, earlier.covered, earlier.from_allowance, earlier.from_balance, funds)

    def settle(self, name: str, reservation: str, *, plan: Plan, cost: Cost, note: str) -> Settlement:
        """Charge a cost: the hold, then the current window, then the free balance; the rest is written off."""
        account = self._account(name)
        hold = self._hold(name, reservation)
        if hold.state in {"settled", "voided"}:
            return replace(_settlement(reservation, hold, True), funds=self._funds_after(account, plan))
        own_window = hold.epoch == account.epoch
        held_allowance, held_balance = (0, 0) if hold.state == "expired" else (hold.from_allowance, hold.from_balance)
        hold.state = "settled"  # from here on its hold counts as free

        # What is held stays held, even if the plan has been lowered since.
        available = max(held_allowance, self.allowance_free(account)) if own_window else held_allowance
        from_own, rest = _pay(available, cost.plan_nano, cost.payg_nano, hold.rate_ppm)
        from_balance = min(rest, held_balance)
        rest -= from_balance
        from_current = 0
        if not own_window:
            from_current, rest = _pay(self.allowance_free(account), _at_rate(rest, hold.rate_ppm), rest, hold.rate_ppm)
        if hold.payg:
            more = min(rest, self.balance_free(account) - from_balance)
            from_balance += more
            rest -= more

        account.used += from_own if own_window else from_current
        lapsed = 0 if own_window else held_allowance - from_own
        from_allowance = from_own + from_current
        account.totals.used += from_allowance
        account.totals.lapsed += lapsed
        account.totals.spent += from_balance
        account.totals.written_off += rest
        hold.paid = (from_allowance, from_balance, rest)
        hold.due_ms = self._time(account) + RESERVATION_RETENTION_MS
        self._remember_time(account)
        self._enter(
            account, "settle", reservation, allowance=from_allowance, balance=-from_balance, written_off=rest,
            lapsed=lapsed, note=note,
        )  # fmt: skip
        return replace(_settlement(reservation, hold, False), funds=self._funds_after(account, plan))

    def release(self, name: str, reservation: str, verb: Literal["void", "expire", "abandon"]) -> Settlement | None:
        """End without a cost."""
        account = self._account(name)
        hold = self._hold(name, reservation)
        now = self._time(account)
        if hold.state != "open":
            return _settlement(reservation, hold, True)
        if verb == "expire" and now < hold.due_ms:
            return None
        hold.state = "voided" if verb == "void" else "expired"
        hold.due_ms = now + RESERVATION_RETENTION_MS
        if hold.epoch != account.epoch:
            account.totals.lapsed += hold.from_allowance
            self._enter(account, "lapse", reservation, lapsed=hold.from_allowance)
        self._remember_time(account)
        return _settlement(reservation, hold, False)

    def due(self, shard: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
        """Overdue reservations; ended records whose retention is over are forgotten."""
        waiting: list[tuple[int, str, Hold | None]] = [
            (hold.due_ms, name, hold) for (at, name), hold in self.holds.items() if at == shard
        ]
        waiting += [
            (operation.due_ms, f"op:{name}:{id_}", None)
            for (name, id_), operation in self.operations.items()
            if shard_of(name) == shard
        ]
        ready = sorted((one for one in waiting if one[0] <= self.now_ms), key=lambda one: one[:2])[:limit]
        overdue = []
        for _, member, hold in ready:
            if hold is not None and hold.state == "open":
                overdue.append((member, hold.account))
            elif hold is not None:
                del self.holds[shard, member]
            else:
                _, name, id_ = member.split(":")
                del self.operations[name, id_]
        return len(ready), overdue

    def credit(
        self, name: str, operation: str, kind: Literal["grant", "refund"], amount_nano: int, reason: str
    ) -> tuple[int, bool]:
        """Add prepaid credits."""
        account = self._account(name)
        what = (kind, amount_nano)
        if self._was_done(name, operation, what):
            return account.balance, True
        if account.balance + amount_nano > MAX_NANO:
            raise Rejected(f"room for {format_credits(MAX_NANO - account.balance)} credits")
        refundable = account.totals.spent - account.totals.refunded
        if kind == "refund" and amount_nano > refundable:
            raise Rejected(f"at most {format_credits(refundable)} credits")
        if kind == "refund":
            account.totals.refunded += amount_nano
        else:
            account.totals.bought += amount_nano
        self._remember_time(account)
        self._enter(account, kind, operation, balance=amount_nano, note=reason)
        self._done(account, operation, what)
        return account.balance, False

    def set_plan(self, name: str, operation: str, version: int, plan: Plan) -> Funds:
        """Move to another plan: what was used stays used, and a longer cycle counts everything used today."""
        account = self._account(name)
        what = ("plan", plan.name, version)
        if self._was_done(name, operation, what):
            return self._funds(account, plan)
        new_version = version or account.plan_version + 1
        if new_version <= account.plan_version:
            raise Rejected(f"newer than {account.plan_version},")
        rolled, lapsed = self._rolled(account, plan)
        self._commit_roll(account, rolled, lapsed)
        window = _window(plan, self._time(rolled))
        carried = rolled.used_earlier if window.start_ms < rolled.window.start_ms else 0
        granted = window.granted_nano - rolled.window.granted_nano - carried
        rolled.lowered |= granted < 0
        rolled.used += carried
        rolled.used_earlier -= carried
        rolled.window, rolled.plan, rolled.plan_version = window, plan.name, new_version
        rolled.totals.granted += granted
        self._remember_time(rolled)
        self._enter(rolled, "plan", operation, granted=granted, plan=plan.name)
        self._done(rolled, operation, what)
        return self._funds(rolled, plan)

    # --- parts --------------------------------------------------------------------------------------------------

    def _account(self, name: str) -> Account:
        if name not in self.accounts:
            raise UnknownAccount(name)
        return self.accounts[name]

    def _hold(self, name: str, reservation: str) -> Hold:
        hold = self.holds.get((shard_of(name), reservation))
        if hold is None or hold.account != name:
            raise UnknownReservation(reservation)
        return hold

    def _time(self, account: Account) -> int:
        return max(self.now_ms, account.seen_ms)

    def _remember_time(self, account: Account) -> None:
        if (now := self._time(account)) < account.window.end_ms:
            account.seen_ms = now

    def _was_done(self, name: str, operation: str, what: tuple[object, ...]) -> bool:
        done = self.operations.get((name, operation))
        if done is not None and done.what != what:
            raise OperationConflict(operation)
        return done is not None

    def _done(self, account: Account, operation: str, what: tuple[object, ...]) -> None:
        due_ms = self._time(account) + OPERATION_RETENTION_MS
        self.operations[account.name, operation] = Operation(what, due_ms)

    def _rolled(self, account: Account, plan: Plan) -> tuple[Account, int]:
        """The account in the window of now, and what lapses by getting there; itself if it is there already."""
        now = self._time(account)
        if now < account.window.end_ms:
            return account, 0
        lapsed = account.window.granted_nano - account.used - self.held(account)
        window = _window(plan, now)
        same_day = account.window.end_ms > now - now % DAY_MS
        used_today = account.used_earlier + account.used if same_day else 0
        # A window that began before the last one ended has seen what was used in that one.
        used = used_today if window.start_ms < account.window.end_ms else 0
        totals = replace(account.totals)
        totals.granted += window.granted_nano - used
        totals.lapsed += lapsed
        rolled = replace(
            account, window=window, used=used, used_earlier=used_today - used, epoch=account.epoch + 1,
            lowered=used > window.granted_nano, totals=totals,
        )  # fmt: skip
        return rolled, lapsed

    def _commit_roll(self, account: Account, rolled: Account, lapsed: int) -> None:
        if rolled is not account:
            self.accounts[account.name] = rolled
            self._enter_refresh(rolled, rolled.window.granted_nano - rolled.used, lapsed)

    def _enter_refresh(self, account: Account, granted: int, lapsed: int) -> None:
        end = str(account.window.end_ms)
        self._enter(account, "refresh", end, granted=granted, lapsed=lapsed, epoch=str(account.epoch))

    def _enter(self, account: Account, kind: str, id_: str, **values: int | str) -> None:
        account.sequence += 1
        entry = {
            "account": account.name,
            "sequence": str(account.sequence),
            "kind": kind,
            "id": id_,
            "time": str(self._time(account)),
            "used_after": str(account.used),
            "balance_after": str(account.balance),
        }
        self.ledger.append(entry | {name: str(value) for name, value in values.items() if value != 0})

    def _funds_now(self, account: Account, plan: Plan) -> Funds:
        return self._funds(self._rolled(account, plan)[0], plan)

    def _funds_after(self, account: Account, plan: Plan) -> Funds:
        """What a settlement shows: the window of now, unless the account has left the reservation's plan."""
        return self._funds_now(account, plan) if account.plan == plan.name else self._funds(account, plan)

    def _funds(self, account: Account, plan: Plan) -> Funds:
        now = self._time(account)
        return Funds(
            plan=account.plan,
            granted_nano=account.window.granted_nano,
            used_nano=account.used,
            held_nano=self.held(account),
            balance_nano=account.balance,
            balance_held_nano=self.balance_held(account),
            resets_at_ms=account.window.end_ms if plan.allowance else None,
            next_granted_nano=_window(plan, max(now, account.window.end_ms)).granted_nano,
            now_ms=now,
            sequence=account.sequence,
        )


def _window(plan: Plan, now_ms: int) -> Window:
    return window_at(plan.allowance or Allowance("per_window", 0, DAY_MS), now_ms)


def _at_rate(nano: int, rate_ppm: int) -> int:
    return -(-nano * rate_ppm // 1_000_000)


def _at_list_price(nano: int, rate_ppm: int) -> int:
    return nano * 1_000_000 // rate_ppm


def _pay(available: int, at_rate: int, at_list_price: int, rate_ppm: int) -> tuple[int, int]:
    """What an allowance pays of a cost, and the list-price cost that is left."""
    if at_rate <= available:
        return at_rate, 0
    return available, at_list_price - _at_list_price(available, rate_ppm)


def _settlement(reservation: str, hold: Hold, repeated: bool) -> Settlement:
    state = hold.state
    assert state != "open"
    return Settlement(reservation, state, *hold.paid, repeated)
