"""Plans: what an account may spend, how often it refreshes and at which rate."""

from dataclasses import field
from typing import Literal

from gateway.domain.value import value

DAY_MS = 86_400_000

#: Rates are parts per million of the list price, so that Lua can multiply by them exactly.
FULL_RATE_PPM = 1_000_000


@value(frozen=True, slots=True)
class Allowance:
    """Credits granted again in every window.

    ``monthly``: amount_nano is spread over the windows of the calendar month (UTC) and sums to it exactly.
    ``per_window``: amount_nano is granted whole in each window.
    refresh_ms divides a day evenly, so that no window crosses midnight UTC.
    """

    kind: Literal["monthly", "per_window"]
    amount_nano: int
    refresh_ms: int


#: What a request is charged whose gateway died: what it was seen to cost, its whole hold, or nothing.
OnLost = Literal["charge_seen", "charge_hold", "release"]

#: The most windows that one plan may have at once.
MAX_WINDOWS = 4


@value(frozen=True, slots=True)
class Plan:
    """One plan of the configuration.

    allowances: up to MAX_WINDOWS, each with a refresh of its own. Whatever is charged counts in all of them, and the
    tightest decides. rate_ppm is what the allowance pays of the list price; prepaid credits (payg) always pay all of
    it.
    """

    name: str
    allowances: tuple[Allowance, ...] = ()
    rate_ppm: int = FULL_RATE_PPM
    payg: bool = True
    on_lost: OnLost = "charge_seen"
    #: The same as the store's scripts take it (``credits/lua/lib/terms.lua``). Two calls of every request give it.
    terms: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths = "".join(f",{one.refresh_ms}" for one in self.allowances)
        windows = ";".join(f"{one.kind},{one.amount_nano},{one.refresh_ms}" for one in self.allowances)
        terms = f"{self.rate_ppm}|{int(self.payg)}|{self.on_lost}|{lengths}|{windows}"
        object.__setattr__(self, "terms", terms)
