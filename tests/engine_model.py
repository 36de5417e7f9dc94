"""The credit engine in plain Python: what every script must answer, and what the store must then hold.

Nothing is kept here that can be derived: what is held is the sum over the open reservations, a balance is what
came in less what was spent. The engine keeps running figures instead, and both must agree after every step.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from gateway.credits.errors import OperationConflict, Rejected, UnknownAccount, UnknownReservation
from gateway.credits.keyspace import shard_of
from gateway.credits.scripts import CreditKind, NotReserved, RepeatKey
from gateway.domain.decision import Extended, Funds, Repeated, Reserved, Settlement, WindowFunds
from gateway.domain.money import MAX_NANO, format_credits
from gateway.domain.plan import DAY_MS, Allowance, Plan
from gateway.domain.price import Cost
from gateway.domain.window import Window, window_at

MAX_SKEW_MS = 60_000
RESERVATION_RETENTION_MS = DAY_MS
VOIDED_RETENTION_MS = 3_600_000
OPERATION_RETENTION_MS = 90 * DAY_MS

Entry = dict[str, str]


@dataclass
class Totals:
    """Lifetime sums, nano."""

    used: int = 0
    bought: int = 0
    refunded: int = 0
    deducted: int = 0
    spent: int = 0
    written_off: int = 0


@dataclass
class Win:
    """A window of an account. first: number of the first window of its length since the plan has it. adopted: numbers
    of the windows that this one replaced at changes of plan."""

    window: Window
    refresh_ms: int
    used: int
    epoch: int
    first: int
    adopted: tuple[int, ...] = ()


@dataclass
class Account:
    """used_today: allowance used since midnight of ``day_ms``. epoch: windows opened so far."""

    name: str
    plan: str
    windows: list[Win] = field(default_factory=list)
    day_ms: int = 0
    used_today: int = 0
    plan_version: int = 0
    epoch: int = 0
    sequence: int = 0
    seen_ms: int = 0
    lowered: bool = False
    totals: Totals = field(default_factory=Totals)
    keys: set[str] = field(default_factory=set)

    @property
    def balance(self) -> int:
        """Prepaid credits, those held included."""
        return self.totals.bought + self.totals.refunded - self.totals.spent - self.totals.deducted

    @property
    def first_end_ms(self) -> int:
        """When the first of its windows ends; without any, the day."""
        return min((one.window.end_ms for one in self.windows), default=self.day_ms + DAY_MS)


@dataclass
class Part:
    """Allowance held, or charged, in some windows: (length, number) of each."""

    amount: int
    spans: tuple[tuple[int, int], ...]


@dataclass
class Hold:
    """A reservation. due_ms: its lease's end while open, afterwards when it may be forgotten. parts and from_balance:
    what is held, once it has ended what was charged."""

    account: str
    parts: list[Part]
    from_balance: int
    covered: int
    rate_ppm: int
    payg: bool
    on_lost: str
    asked: tuple[Cost, int, int, str, bool]
    created_ms: int | None
    due_ms: int
    key: str = ""
    state: Literal["open", "expired", "settled", "voided", "refunded"] = "open"
    seen: Cost = field(default_factory=lambda: Cost(0, 0))
    seen_note: str = ""
    written_off: int = 0

    @property
    def from_allowance(self) -> int:
        """All parts together."""
        return sum(part.amount for part in self.parts)


@dataclass
class Operation:
    """A grant, refund or plan change that was done."""

    what: tuple[object, ...]
    due_ms: int


@dataclass
class Remembered:
    """A client's idempotency key that came with a request."""

    body_hash: str
    reservation: str
    due_ms: int


Postings = dict[str, int]


class EngineModel:
    """All accounts. now_ms is the store's clock. Every method answers and raises what its namesake in
    ``gateway.credits.scripts`` does; a Rejected here carries only the figure that the real text must contain."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.accounts: dict[str, Account] = {}
        self.holds: dict[tuple[int, str], Hold] = {}
        self.operations: dict[tuple[str, str], Operation] = {}
        self.requests: dict[tuple[str, str], Remembered] = {}
        self.ledger: list[Entry] = []

    # --- what follows from the reservations ---------------------------------------------------------------------

    def open_holds(self, account: Account) -> Iterator[Hold]:
        """The account's open reservations."""
        return (hold for hold in self.holds.values() if hold.account == account.name and hold.state == "open")

    def held_as(self, account: Account, win: Win, how: str) -> int:
        """Allowance of the open reservations that a window counts as held, adopted or before."""
        parts = (part for hold in self.open_holds(account) for part in hold.parts)
        return sum(part.amount for part in parts if how_held(win, part) == how)

    def free_in(self, account: Account, win: Win) -> int:
        """What one window can still give; below 0 after a downgrade."""
        held = self.held_as(account, win, "held") + self.held_as(account, win, "adopted")
        return win.window.granted_nano - win.used - held

    def allowance_free(self, account: Account) -> int:
        """What all of the windows can still give."""
        return max(0, min((self.free_in(account, win) for win in account.windows), default=0))

    def balance_held(self, account: Account) -> int:
        """Prepaid credits held."""
        return sum(hold.from_balance for hold in self.open_holds(account))

    def balance_free(self, account: Account) -> int:
        """Prepaid credits that nothing holds."""
        return account.balance - self.balance_held(account)

    # --- scripts ------------------------------------------------------------------------------------------------

    def create(self, name: str, plan: Plan) -> Funds:
        """Open an account."""
        if name in self.accounts:
            raise Rejected(f"on plan {self.accounts[name].plan!r}")
        account, entries = self._rolled(Account(name, plan.name, seen_ms=self.now_ms), plan)
        self._enter(account, "open", name, {}, plan=plan.name)
        self._commit(account, entries)
        return self._funds(account, plan)

    def show(self, name: str, plan: Plan) -> Funds | str:
        """Funds in the windows of now, or the plan's name if it is another one."""
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
        alone_nano: int,
        lease_ms: int,
        key_id: str,
        gateway_ms: int,
        repeat: RepeatKey | None = None,
        grows: bool = False,
    ) -> Reserved | NotReserved | Repeated:
        """Hold credits."""
        account = self.accounts.get(name)
        if account is None:
            return NotReserved("unknown_account")
        asked = (amount, minimum_nano, alone_nano, repeat.key_hash if repeat else "", grows)
        if earlier := self.holds.get((shard_of(name), reservation)):
            return self._reserve_again(account, reservation, earlier, plan, asked)
        if key_id and key_id not in account.keys:
            return NotReserved("unknown_key")
        if repeat and (repeated := self._repeated(name, repeat)):
            return repeated
        if account.plan != plan.name:
            return NotReserved("other_plan", account.plan)
        now = self._time(account)
        if self._skewed(account, gateway_ms):
            return NotReserved("skewed")

        rolled, entries = self._rolled(account, plan)
        free, balance = self.allowance_free(rolled), self.balance_free(rolled) if plan.payg else 0
        if amount.plan_nano <= free:
            from_allowance, from_balance, covered = amount.plan_nano, 0, amount.payg_nano
        else:
            # Callers derive both amounts from one cost; whatever they give, the balance never pays a negative rest.
            by_allowance = min(amount.payg_nano, _at_list_price(free, plan.rate_ppm))
            from_allowance, from_balance = free, min(balance, amount.payg_nano - by_allowance)
            covered = by_allowance + from_balance
        in_flight = self._in_flight(rolled, plan)
        least = min(minimum_nano if in_flight else alone_nano, amount.payg_nano)
        left = free - from_allowance + balance - from_balance
        if covered < least or (grows and left < min(in_flight // 8, 8 * amount.payg_nano)):
            return NotReserved("denied", plan.name, self._funds(rolled, plan))

        self._commit(rolled, entries)
        self._remember_time(rolled)
        hold = self.holds[shard_of(name), reservation] = Hold(
            name, [], from_balance, covered, plan.rate_ppm, plan.payg, plan.on_lost, asked, now, now + lease_ms, key_id
        )
        _hold_more(rolled, hold, from_allowance)
        if repeat:
            due_ms = now + RESERVATION_RETENTION_MS
            self.requests[name, repeat.key_hash] = Remembered(repeat.body_hash, reservation, due_ms)
        return Reserved(reservation, covered, from_allowance, from_balance, self._funds(rolled, plan))

    def _in_flight(self, account: Account, plan: Plan) -> int:
        """What open reservations hold of what the plan uses now, by the window that they hold most of."""
        parts = self._open_parts(account)
        in_windows = (
            sum(part.amount for part in parts if how_held(win, part) in {"held", "adopted"}) for win in account.windows
        )
        return max(in_windows, default=0) + (self.balance_held(account) if plan.payg else 0)

    def _reserve_again(
        self, account: Account, reservation: str, earlier: Hold, plan: Plan, asked: tuple[Cost, int, int, str, bool]
    ) -> Reserved | NotReserved:
        if earlier.account != account.name:
            return NotReserved("conflict")
        if earlier.state != "open":
            return NotReserved("ended")
        if earlier.asked != asked:
            return NotReserved("conflict")
        funds = self._funds(account, plan)
        return Reserved(reservation, earlier.covered, earlier.from_allowance, earlier.from_balance, funds)

    def _repeated(self, name: str, repeat: RepeatKey) -> Repeated | None:
        first = self.requests.get((name, repeat.key_hash))
        if first is None:
            return None
        if first.body_hash != repeat.body_hash:
            return Repeated("other_body")
        hold = self.holds.get((shard_of(name), first.reservation))
        if hold is None:
            return None
        if hold.state == "open":
            return Repeated("in_progress", first.reservation)
        cost = hold.from_allowance + hold.from_balance + hold.written_off
        if hold.state == "expired" and not cost:
            return None
        return Repeated("answered", first.reservation, cost)

    def extend(
        self,
        name: str,
        reservation: str,
        *,
        plan: Plan,
        wanted: Cost,
        seen: Cost,
        seen_note: str,
        lease_ms: int,
        gateway_ms: int,
    ) -> Extended:
        """Hold more."""
        account = self._account(name)
        hold = self._hold(name, reservation)
        if hold.state not in {"open", "expired"}:
            return Extended(0, 0, 0, open=False, funds=self._funds(account, plan))
        if hold.state == "expired":
            postings: Postings = Counter()
            self._uncharge(account, hold, postings)
            hold.state, hold.written_off, hold.due_ms = "open", 0, 0
            covered = min(hold.covered, _at_list_price(hold.from_allowance, hold.rate_ppm))
            hold.covered = covered + hold.from_balance
            self._enter(account, "reopen", reservation, postings, model="model", key=hold.key)
        if wanted.payg_nano > hold.covered:
            if account.plan == plan.name and not self._skewed(account, gateway_ms):
                rolled, entries = self._rolled(account, plan)
                self._commit(rolled, entries)
                account = rolled
            current = self._time(account) < account.first_end_ms
            free, free_balance = self.allowance_free(account) if current else 0, self.balance_free(account)
            held = hold.from_allowance
            rest = wanted.payg_nano - min(wanted.payg_nano, _at_list_price(held, hold.rate_ppm)) - hold.from_balance
            most = _at_rate(rest, hold.rate_ppm) if hold.from_balance else wanted.plan_nano - held
            more = max(0, min(free, most))
            by_allowance = min(wanted.payg_nano, _at_list_price(held + more, hold.rate_ppm))
            if not hold.from_balance and held + more >= wanted.plan_nano:
                by_allowance = wanted.payg_nano
            rest = wanted.payg_nano - by_allowance - hold.from_balance
            hold.from_balance += max(0, min(free_balance, rest)) if hold.payg else 0
            _hold_more(account, hold, more)
            hold.covered = max(hold.covered, min(wanted.payg_nano, by_allowance + hold.from_balance))
        hold.due_ms = max(hold.due_ms, self._time(account) + lease_ms)
        if seen.payg_nano >= hold.seen.payg_nano:
            hold.seen, hold.seen_note = seen, seen_note
        self._remember_time(account)
        return Extended(
            hold.covered, hold.from_allowance, hold.from_balance, open=True, funds=self._funds(account, plan)
        )

    def settle(
        self,
        name: str,
        reservation: str,
        *,
        plan: Plan,
        cost: Cost,
        note: str,
        created_ms: int = 0,
        key_id: str = "",
    ) -> Settlement:
        """Charge a cost: the hold, then the windows of now, then the free balance; the rest is written off."""
        account = self._account(name)
        hold = self.holds.get((shard_of(name), reservation))
        if hold is None and self._time(account) < created_ms + VOIDED_RETENTION_MS:
            hold = Hold(name, [], 0, 0, plan.rate_ppm, plan.payg, "", (cost, 0, 0, ""), created_ms, 0, key_id)
            self.holds[shard_of(name), reservation] = hold
        if hold is None or hold.account != name:
            raise UnknownReservation(reservation)
        if hold.state not in {"open", "expired"}:
            return _settlement(reservation, hold, True)._replace(funds=self._funds_after(account, plan))
        postings: Postings = Counter()
        if hold.state == "expired":
            self._uncharge(account, hold, postings)
        self._charge(account, hold, cost, "settled", postings)
        self._remember_time(account)
        self._enter(account, "settle", reservation, postings, model="model", key=hold.key, note=note)
        return _settlement(reservation, hold, False)._replace(funds=self._funds_after(account, plan))

    def release(self, name: str, reservation: str, verb: Literal["void", "expire", "abandon"]) -> Settlement | None:
        """End without its maker's word on the cost."""
        account = self._account(name)
        hold = self._hold(name, reservation)
        late = verb == "void" and hold.state == "expired"
        if hold.state != "open" and not late:
            return _settlement(reservation, hold, True)
        if verb == "expire" and self._time(account) < hold.due_ms:
            return None
        cost = Cost(0, 0)
        if verb != "void" and hold.on_lost == "charge_seen":
            cost = hold.seen
        elif verb != "void" and hold.on_lost == "charge_hold":
            cost = Cost(hold.covered, _at_rate(hold.covered, hold.rate_ppm))
        postings: Postings = Counter()
        if late:
            self._uncharge(account, hold, postings)
        self._charge(account, hold, cost, "voided" if verb == "void" else "expired", postings)
        if verb == "void":
            self._forget_request(name, reservation)
        self._remember_time(account)
        if any(postings.values()):
            kind = "void" if late else "expire" if cost.payg_nano else "lapse"
            self._enter(account, kind, reservation, postings, model="model", key=hold.key, note=hold.seen_note)
        return _settlement(reservation, hold, False)

    def _forget_request(self, name: str, reservation: str) -> None:
        for key, request in list(self.requests.items()):
            if key[0] == name and request.reservation == reservation:
                del self.requests[key]

    def refund(self, name: str, operation: str, reservation: str, note: str) -> Settlement:
        """Give back what a request was charged."""
        account = self._account(name)
        self._was_done(name, operation, ("refund_request", reservation))
        hold = self._hold(name, reservation)
        if hold.state == "refunded":
            return _settlement(reservation, hold, True)
        if hold.state not in {"settled", "expired"}:
            raise Rejected(f"is {hold.state}")
        refundable = account.totals.spent - account.totals.refunded
        if hold.from_balance > refundable:
            raise Rejected(f"at most {format_credits(refundable)} credits")
        postings: Postings = Counter()
        charged = replace(hold, parts=[replace(part) for part in hold.parts])
        charged.created_ms = hold.created_ms if hold.state == "expired" else None
        self._uncharge(account, charged, postings)
        self._charge(account, charged, Cost(0, 0), "refunded", postings)
        hold.state, hold.due_ms = "refunded", self._time(account) + RESERVATION_RETENTION_MS
        self._remember_time(account)
        self._enter(account, "refund_request", operation, postings, note=note)
        self._done(account, operation, ("refund_request", reservation))
        return _settlement(reservation, hold, False)

    def due(self, shard: int, limit: int, gateway_ms: int) -> tuple[int, list[tuple[str, str]]]:
        """Overdue reservations; ended records whose retention is over are forgotten."""
        if abs(self.now_ms - gateway_ms) > MAX_SKEW_MS:
            return 0, []
        waiting: list[tuple[int, str, Hold | None]] = [
            (hold.due_ms, name, hold) for (at, name), hold in self.holds.items() if at == shard
        ]
        waiting += [
            (operation.due_ms, f"op:{name}:{id_}", None)
            for (name, id_), operation in self.operations.items()
            if shard_of(name) == shard
        ]
        waiting += [
            (request.due_ms, f"idem:{name}:{key_hash}", None)
            for (name, key_hash), request in self.requests.items()
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
                kind, name, id_ = member.split(":")
                del (self.operations if kind == "op" else self.requests)[name, id_]
        return len(ready), overdue

    def credit(self, name: str, operation: str, kind: CreditKind, amount_nano: int, note: str) -> tuple[int, bool]:
        """Change prepaid credits."""
        account = self._account(name)
        what = (kind, amount_nano)
        if self._was_done(name, operation, what):
            return account.balance, True
        if kind == "deduct":
            if amount_nano > (free := self.balance_free(account)):
                raise Rejected(f"at most {format_credits(free)} credits")
        elif account.balance + amount_nano > MAX_NANO:
            raise Rejected(f"room for {format_credits(MAX_NANO - account.balance)} credits")
        refundable = account.totals.spent - account.totals.refunded
        if kind == "refund" and amount_nano > refundable:
            raise Rejected(f"at most {format_credits(refundable)} credits")
        book = {"grant": "bought", "refund": "refunded", "deduct": "deducted"}[kind]
        setattr(account.totals, book, getattr(account.totals, book) + amount_nano)
        change = -amount_nano if kind == "deduct" else amount_nano
        self._remember_time(account)
        self._enter(account, kind, operation, {book: -change, "balance": change}, note=note)
        self._done(account, operation, what)
        return account.balance, False

    def set_plan(self, name: str, operation: str, version: int, plan: Plan) -> Funds:
        """Move to another plan: what was used stays used."""
        account = self._account(name)
        what = ("plan", plan.name, version)
        if self._was_done(name, operation, what):
            return self._funds(account, plan)
        new_version = version or account.plan_version + 1
        if new_version <= account.plan_version:
            raise Rejected(f"newer than {account.plan_version},")
        rolled, entries = self._rolled(account, plan)
        self._commit(rolled, entries)
        postings: Postings = Counter()
        for win, allowance in zip(rolled.windows, plan.allowances, strict=True):
            window = window_at(allowance, self._time(rolled))
            added = window.granted_nano - win.window.granted_nano
            postings[f"granted:{win.refresh_ms}"] -= added
            postings[f"window:{win.refresh_ms}"] += added
            rolled.lowered |= added < 0
            win.window = replace(win.window, granted_nano=window.granted_nano)
        rolled.plan, rolled.plan_version = plan.name, new_version
        self._remember_time(rolled)
        self._enter(rolled, "plan", operation, postings, plan=plan.name)
        self._done(rolled, operation, what)
        return self._funds(rolled, plan)

    # --- charging -----------------------------------------------------------------------------------------------

    def _charge(
        self,
        account: Account,
        hold: Hold,
        cost: Cost,
        state: Literal["settled", "voided", "expired", "refunded"],
        postings: Postings,
    ) -> None:
        held_allowance, held_balance = hold.from_allowance, hold.from_balance
        hold.state = state  # from here on its hold counts as free
        held_parts = [part for part in hold.parts if part.amount]
        in_own = all(how_held(win, part) in {"held", "adopted"} for win in account.windows for part in held_parts)
        # What is held stays held, even if the plan has been lowered since.
        available = max(held_allowance, self.allowance_free(account)) if in_own else held_allowance
        by_hold, rest = _pay(available, cost.plan_nano, cost.payg_nano, hold.rate_ppm)
        from_balance = min(rest, held_balance)
        rest -= from_balance

        parts = []
        for part in hold.parts:
            used = min(by_hold, part.amount)
            self._use(account, hold, part, used, 1, postings)
            parts.append(Part(used, part.spans))
            by_hold -= used
        if not in_own:
            free = self.allowance_free(account)
            by_hold, rest = _pay(free, _at_rate(rest, hold.rate_ppm), rest, hold.rate_ppm)
        if by_hold:
            for win in account.windows:
                win.used += by_hold
                postings[f"window:{win.refresh_ms}"] -= by_hold
                postings[f"used:{win.refresh_ms}"] += by_hold
            account.used_today += by_hold
            parts.append(Part(by_hold, _spans(account)))
        if hold.payg:
            more = min(rest, self.balance_free(account) - from_balance)
            from_balance += more
            rest -= more
        hold.parts, hold.from_balance, hold.written_off = parts, from_balance, rest
        retention_ms = VOIDED_RETENTION_MS if state == "voided" else RESERVATION_RETENTION_MS
        hold.due_ms = self._time(account) + retention_ms
        _book(account, hold, 1, postings)

    def _uncharge(self, account: Account, hold: Hold, postings: Postings) -> None:
        for part in hold.parts:
            self._use(account, hold, part, part.amount, -1, postings)
        _book(account, hold, -1, postings)

    def _use(self, account: Account, hold: Hold, part: Part, used: int, sign: int, postings: Postings) -> None:
        today = hold.created_ms is not None and hold.created_ms >= account.day_ms
        for win in account.windows:
            how = how_held(win, part)
            if how in {"held", "adopted"}:
                change = max(sign * used, -win.used)
                win.used += change
                postings[f"window:{win.refresh_ms}"] -= change
                postings[f"used:{win.refresh_ms}"] += change
                today = True
            elif how == "before":
                postings[f"before:{win.refresh_ms}"] -= sign * part.amount
                postings[f"used:{win.refresh_ms}"] += sign * used
                postings[f"lapsed:{win.refresh_ms}"] += sign * (part.amount - used)
        for refresh_ms, _ in part.spans:
            if all(win.refresh_ms != refresh_ms or how_held(win, part) == "none" for win in account.windows):
                postings[f"lapsed:{refresh_ms}"] -= sign * used
                postings[f"used:{refresh_ms}"] += sign * used
        if today:
            account.used_today = max(0, account.used_today + sign * used)

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

    def _open_parts(self, account: Account) -> list[Part]:
        return [part for hold in self.open_holds(account) for part in hold.parts if part.amount]

    def _time(self, account: Account) -> int:
        return max(self.now_ms, account.seen_ms)

    def _skewed(self, account: Account, gateway_ms: int) -> bool:
        if not account.windows:
            return False
        return self._time(account) >= account.first_end_ms and abs(self.now_ms - gateway_ms) > MAX_SKEW_MS

    def _remember_time(self, account: Account) -> None:
        if (now := self._time(account)) < account.first_end_ms:
            account.seen_ms = now

    def _was_done(self, name: str, operation: str, what: tuple[object, ...]) -> bool:
        done = self.operations.get((name, operation))
        if done is not None and done.what != what:
            raise OperationConflict(operation)
        return done is not None

    def _done(self, account: Account, operation: str, what: tuple[object, ...]) -> None:
        due_ms = self._time(account) + OPERATION_RETENTION_MS
        self.operations[account.name, operation] = Operation(what, due_ms)

    def _rolled(self, account: Account, plan: Plan) -> tuple[Account, list[tuple[str, str, Postings]]]:
        """A copy of the account in the windows of now, and the ledger's entries of getting there."""
        now = self._time(account)
        rolled = replace(account, totals=replace(account.totals), windows=[])
        if (day := now - now % DAY_MS) > account.day_ms:
            rolled.day_ms, rolled.used_today = day, 0
        old = {win.refresh_ms: win for win in account.windows}
        entries: list[tuple[str, str, Postings]] = []
        for allowance in plan.allowances:
            before, length = old.get(allowance.refresh_ms), allowance.refresh_ms
            if before and now < before.window.end_ms:
                rolled.windows.append(replace(before))
                continue
            rolled.epoch += 1
            if before:
                win = Win(window_at(allowance, now), length, 0, rolled.epoch, before.first)
                left = before.window.granted_nano - before.used
                held = self.held_as(account, before, "held")
                postings = {
                    f"granted:{length}": -win.window.granted_nano,
                    f"window:{length}": win.window.granted_nano - left,
                    f"lapsed:{length}": left - held,
                    f"before:{length}": held,
                }
            else:
                win = self._first_window(account, rolled, allowance)
                left = win.window.granted_nano - win.used
                rolled.lowered |= left < 0
                postings = {f"granted:{length}": -left, f"window:{length}": left}
            rolled.windows.append(win)
            entries.append(("refresh", f"{length}:{win.window.end_ms}", postings))
        for win in account.windows:
            if win.refresh_ms not in {allowance.refresh_ms for allowance in plan.allowances}:
                left, before_ = win.window.granted_nano - win.used, self.held_as(account, win, "before")
                length = win.refresh_ms
                postings = {f"window:{length}": -left, f"before:{length}": -before_, f"lapsed:{length}": left + before_}
                entries.append(("close", str(length), postings))
        return rolled, entries

    def _first_window(self, account: Account, rolled: Account, allowance: Allowance) -> Win:
        """It has seen no more than the day's use, nor more than a window that began no later."""
        window = window_at(allowance, self._time(account))
        covering = [win for win in account.windows if win.window.start_ms <= window.start_ms < win.window.end_ms]
        used = min([rolled.used_today, *(win.used for win in covering)])
        current = [win for win in account.windows if self._time(account) < win.window.end_ms]
        adopted: tuple[int, ...] = ()
        if current:
            parent = [win for win in current if win in covering][-1:] or current[:1]
            held, adopted_held = (self.held_as(account, parent[0], how) for how in ("held", "adopted"))
            adopted = ((parent[0].epoch,) if held else ()) + (parent[0].adopted if adopted_held else ())
        return Win(window, allowance.refresh_ms, used, rolled.epoch, rolled.epoch, adopted)

    def _commit(self, rolled: Account, entries: list[tuple[str, str, Postings]]) -> None:
        self.accounts[rolled.name] = rolled
        for kind, id_, postings in entries:
            self._enter(rolled, kind, id_, postings)
            # A window of a new length may find more used and held before it than it grants.
            rolled.lowered |= any(self.free_in(rolled, win) < 0 for win in rolled.windows)
        self._remember_time(rolled)

    def _enter(self, account: Account, kind: str, id_: str, postings: Postings, **values: str) -> None:
        account.sequence += 1
        entry = {
            "account": account.name,
            "sequence": str(account.sequence),
            "kind": kind,
            "id": id_,
            "time": str(self._time(account)),
            "postings": " ".join(sorted(f"{book}={nano}" for book, nano in postings.items() if nano)),
            "used_after": " ".join(f"{win.refresh_ms}:{win.used}" for win in account.windows),
            "balance_after": str(account.balance),
        }
        self.ledger.append(entry | values)

    def _funds_now(self, account: Account, plan: Plan) -> Funds:
        return self._funds(self._rolled(account, plan)[0], plan)

    def _funds_after(self, account: Account, plan: Plan) -> Funds:
        """What a settlement shows: the windows of now, unless the account has left the reservation's plan."""
        return self._funds_now(account, plan) if account.plan == plan.name else self._funds(account, plan)

    def _funds(self, account: Account, plan: Plan) -> Funds:
        now = self._time(account)
        windows = []
        for win in account.windows:
            held = self.held_as(account, win, "held") + self.held_as(account, win, "adopted")
            windows.append(WindowFunds(win.refresh_ms, win.window.granted_nano, win.used, held, win.window.end_ms))
        return Funds(
            plan=account.plan,
            balance_nano=account.balance,
            balance_held_nano=self.balance_held(account),
            now_ms=now,
            sequence=account.sequence,
            windows=tuple(windows),
        )


def how_held(win: Win, part: Part) -> str:
    """How a window counts a part: held in it, adopted from the window that it replaced, held by a window of its length
    before it, or not at all."""
    epochs = {epoch for _, epoch in part.spans}
    if win.epoch in epochs:
        return "held"
    if not epochs.isdisjoint(win.adopted):
        return "adopted"
    before = any(length == win.refresh_ms and epoch >= win.first for length, epoch in part.spans)
    return "before" if before else "none"


def _spans(account: Account) -> tuple[tuple[int, int], ...]:
    return tuple((win.refresh_ms, win.epoch) for win in account.windows)


def _hold_more(account: Account, hold: Hold, more: int) -> None:
    spans = _spans(account)
    if hold.parts and hold.parts[-1].spans == spans:
        hold.parts[-1].amount += more
    elif more:
        hold.parts.append(Part(more, spans))


def _book(account: Account, hold: Hold, sign: int, postings: Postings) -> None:
    account.totals.used += sign * hold.from_allowance
    account.totals.spent += sign * hold.from_balance
    account.totals.written_off += sign * hold.written_off
    for to, from_, nano in (("balance", "spent", hold.from_balance), ("unpaid", "written_off", hold.written_off)):
        postings[to] -= sign * nano
        postings[from_] += sign * nano


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
    return Settlement(reservation, state, hold.from_allowance, hold.from_balance, hold.written_off, repeated)
