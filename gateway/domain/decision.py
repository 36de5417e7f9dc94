"""What the engine answers. A denial is a value like any other.

What every request makes are named tuples: one is made of a reply's values in a third of the time of a dataclass.
"""

from typing import Literal, NamedTuple

from gateway.domain.plan import FULL_RATE_PPM, Plan
from gateway.domain.value import value
from gateway.domain.window import window_at

Source = Literal["allowance", "payg", "mixed"]


class WindowFunds(NamedTuple):
    """One window of an allowance. refresh_ms: its length. resets_at_ms: its end, milliseconds since 1970."""

    refresh_ms: int
    granted_nano: int
    used_nano: int
    held_nano: int
    resets_at_ms: int

    @property
    def remaining_nano(self) -> int:
        """What the window can still pay; 0 after a downgrade below what was used."""
        left_nano = self.granted_nano - self.used_nano - self.held_nano
        return left_nano if left_nano > 0 else 0  # max() takes 1,000 instructions


_NO_WINDOW = WindowFunds(0, 0, 0, 0, 0)


class Funds(NamedTuple):
    """An account's credits at one moment of the store's clock, in nano-credits.

    windows: in the plan's order; none on a plan without an allowance.
    """

    plan: str
    balance_nano: int
    balance_held_nano: int
    now_ms: int
    sequence: int
    windows: tuple[WindowFunds, ...] = ()

    @property
    def tightest(self) -> WindowFunds:
        """The window that decides: the least remains in it; of several such, the one that refreshes last."""
        if len(self.windows) == 1:
            return self.windows[0]
        return min(self.windows, key=lambda window: (window.remaining_nano, -window.resets_at_ms), default=_NO_WINDOW)

    @property
    def granted_nano(self) -> int:
        """What the deciding window granted."""
        return self.tightest.granted_nano

    @property
    def used_nano(self) -> int:
        """What was used of the deciding window."""
        return self.tightest.used_nano

    @property
    def allowance_remaining_nano(self) -> int:
        """What the allowance can still pay."""
        return self.tightest.remaining_nano

    @property
    def held_nano(self) -> int:
        """What requests in flight hold of the deciding window."""
        return self.tightest.held_nano

    @property
    def resets_at_ms(self) -> int | None:
        """When the deciding window refreshes; None on a plan without an allowance."""
        return self.tightest.resets_at_ms if self.windows else None

    @property
    def balance_free_nano(self) -> int:
        """Prepaid credits that no request in flight holds."""
        return self.balance_nano - self.balance_held_nano

    def allowance_at_nano(self, moment_ms: int, plan: Plan) -> int:
        """What the plan's allowance could pay at a coming moment, if nothing is in flight and nothing is used until
        then."""
        return min(
            (
                self._next_grant_nano(w, plan) if w.resets_at_ms <= moment_ms else max(0, w.granted_nano - w.used_nano)
                for w in self.windows
            ),
            default=0,
        )

    def _next_grant_nano(self, window: WindowFunds, plan: Plan) -> int:
        """What the window after one grants; 0 if the plan has none of that length."""
        at_ms = max(self.now_ms, window.resets_at_ms)
        allowances = (allowance for allowance in plan.allowances if allowance.refresh_ms == window.refresh_ms)
        return next((window_at(allowance, at_ms).granted_nano for allowance in allowances), 0)


class Reserved(NamedTuple):
    """Credits are held. payg_nano is the list-price cost that the hold covers: at least the minimum asked
    for, at most the amount asked for."""

    reservation_id: str
    payg_nano: int
    from_allowance_nano: int
    from_balance_nano: int
    funds: Funds

    @property
    def held_nano(self) -> int:
        """Credits held, from both sources."""
        return self.from_allowance_nano + self.from_balance_nano

    @property
    def source(self) -> Source:
        """Where the held credits come from."""
        return source_of(self.from_allowance_nano, self.from_balance_nano)


@value(frozen=True, slots=True)
class Extended:
    """A hold as it is after it was extended. payg_nano: the list-price cost that it covers now; less than was asked for
    where credits ran short. open: whether the reservation still is."""

    payg_nano: int
    from_allowance_nano: int
    from_balance_nano: int
    open: bool
    funds: Funds

    @property
    def held_nano(self) -> int:
        """Credits held, from both sources."""
        return self.from_allowance_nano + self.from_balance_nano


@value(frozen=True, slots=True)
class Repeated:
    """The client sent an idempotency key again. cost_nano: what the first request was charged, once answered."""

    state: Literal["in_progress", "answered", "other_body"]
    reservation_id: str = ""
    cost_nano: int = 0


Reason = Literal["credits_in_flight", "refresh_soon", "allowance_spent", "exceeds_balance", "no_credits"]


@value(frozen=True, slots=True)
class Denied:
    """Not admitted; nothing was written. required_nano: the least that the request would have had to hold. window: the
    one whose refresh brings that, or else the one that decides; None on a plan without an allowance."""

    reason: Reason
    required_nano: int
    funds: Funds
    window: WindowFunds | None


class Settlement(NamedTuple):
    """How a reservation ended: who paid what, in nano-credits. state: settled, voided,
    expired or refunded. repeated: it had ended before. funds: the account afterwards; None after a release."""

    reservation_id: str
    state: Literal["settled", "voided", "expired", "refunded"]
    from_allowance_nano: int
    from_balance_nano: int
    written_off_nano: int
    repeated: bool
    funds: Funds | None = None

    @property
    def cost_nano(self) -> int:
        """allowance + balance + written off."""
        return self.from_allowance_nano + self.from_balance_nano + self.written_off_nano

    @property
    def source(self) -> Source:
        """Where the credits came from; allowance for a cost of nothing."""
        return source_of(self.from_allowance_nano, self.from_balance_nano)


#: A refresh this near is told to the client as "try again", farther ones as "spent": SDKs sleep on Retry-After.
SOON_MS = 60_000


def deny(required_nano: int, funds: Funds, plan: Plan) -> Denied:
    """Name the reason why required_nano (list price) was not to be had from funds."""
    balance = funds.balance_nano if plan.payg else 0
    free = affordable_nano(funds, plan)

    def fits(moment_ms: int) -> bool:
        return _at_list_price(funds.allowance_at_nano(moment_ms, plan), plan) + balance >= required_nano

    enough = next((w for w in sorted(funds.windows, key=lambda w: w.resets_at_ms) if fits(w.resets_at_ms)), None)
    held = any(window.held_nano for window in funds.windows) or (plan.payg and funds.balance_held_nano > 0)
    reason: Reason
    if held and fits(funds.now_ms):
        reason, enough = "credits_in_flight", None
    elif enough is not None:
        reason = "refresh_soon" if enough.resets_at_ms - funds.now_ms <= SOON_MS else "allowance_spent"
    else:
        reason = "exceeds_balance" if free or held else "no_credits"
    return Denied(reason, required_nano, funds, enough or (funds.tightest if funds.windows else None))


def affordable_nano(funds: Funds, plan: Plan) -> int:
    """The list-price cost that could be held right now."""
    return _at_list_price(funds.allowance_remaining_nano, plan) + (funds.balance_free_nano if plan.payg else 0)


def _at_list_price(allowance_nano: int, plan: Plan) -> int:
    return allowance_nano * FULL_RATE_PPM // plan.rate_ppm


def source_of(from_allowance_nano: int, from_balance_nano: int) -> Source:
    """The word for a split of credits over the two sources."""
    if not from_balance_nano:
        return "allowance"
    return "mixed" if from_allowance_nano else "payg"
