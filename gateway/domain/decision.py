"""What the engine answers. A denial is a value like any other."""

from dataclasses import dataclass
from typing import Literal

from gateway.domain.plan import FULL_RATE_PPM, Plan

Source = Literal["allowance", "payg", "mixed"]


@dataclass(frozen=True, slots=True)
class Funds:
    """An account's credits at one moment of the store's clock, in nano-credits.

    resets_at_ms: end of the window, milliseconds since 1970; None on a plan without an allowance.
    next_granted_nano: what the next window will grant.
    """

    plan: str
    granted_nano: int
    used_nano: int
    held_nano: int
    balance_nano: int
    balance_held_nano: int
    resets_at_ms: int | None
    next_granted_nano: int
    now_ms: int
    sequence: int

    @property
    def allowance_remaining_nano(self) -> int:
        """What the allowance can still pay; 0 after a downgrade below what was used."""
        return max(0, self.granted_nano - self.used_nano - self.held_nano)

    @property
    def balance_free_nano(self) -> int:
        """Prepaid credits that no request in flight holds."""
        return self.balance_nano - self.balance_held_nano


@dataclass(frozen=True, slots=True)
class Reserved:
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


Reason = Literal["credits_in_flight", "refresh_soon", "allowance_spent", "exceeds_balance", "no_credits"]


@dataclass(frozen=True, slots=True)
class Denied:
    """Not admitted; nothing was written. required_nano: the least that the request would have had to hold."""

    reason: Reason
    required_nano: int
    funds: Funds


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a reservation ended: who paid what, in nano-credits. state: settled, voided or expired.
    repeated: it had ended before. funds: the account afterwards; None after a release."""

    reservation_id: str
    state: Literal["settled", "voided", "expired"]
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
    in_flight = _at_list_price(funds.held_nano, plan) + (funds.balance_held_nano if plan.payg else 0)
    fits_next_window = _at_list_price(funds.next_granted_nano, plan) + balance >= required_nano
    reason: Reason
    if in_flight and free + in_flight >= required_nano:
        reason = "credits_in_flight"
    elif funds.resets_at_ms is not None and fits_next_window:
        reason = "refresh_soon" if funds.resets_at_ms - funds.now_ms <= SOON_MS else "allowance_spent"
    else:
        reason = "exceeds_balance" if free + in_flight else "no_credits"
    return Denied(reason, required_nano, funds)


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
