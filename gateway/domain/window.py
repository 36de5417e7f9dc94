"""Windows: the spans between two refreshes, numbered and aligned to UTC.

The engine computes the same in Lua from the store's clock (``credits/lua/lib/window.lua``); this twin
serves displays and is what the tests compare the Lua with.
"""

from calendar import monthrange
from datetime import UTC, datetime

from gateway.domain.plan import DAY_MS, Allowance
from gateway.domain.value import value


@value(frozen=True, slots=True)
class Window:
    """A half-open span of UTC time, in milliseconds since 1970, and the credits that it grants."""

    number: int
    start_ms: int
    end_ms: int
    granted_nano: int


def window_at(allowance: Allowance, now_ms: int) -> Window:
    """The window that contains now_ms."""
    number = now_ms // allowance.refresh_ms
    start_ms = number * allowance.refresh_ms
    return Window(number, start_ms, start_ms + allowance.refresh_ms, _granted(allowance, start_ms))


def _granted(allowance: Allowance, start_ms: int) -> int:
    if allowance.kind == "per_window":
        return allowance.amount_nano
    start = datetime.fromtimestamp(start_ms // 1000, UTC)
    per_day = DAY_MS // allowance.refresh_ms
    windows = monthrange(start.year, start.month)[1] * per_day
    index = (start.day - 1) * per_day + (start_ms % DAY_MS) // allowance.refresh_ms
    # Cumulative rounding: window k ends at floor(amount * (k+1) / windows), so the month sums exactly.
    return allowance.amount_nano * (index + 1) // windows - allowance.amount_nano * index // windows
