"""Windows of an allowance: aligned to UTC, and a month's windows sum to the monthly figure."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS, Allowance
from gateway.domain.window import window_at

HOUR_MS = 3_600_000
PROFESSIONAL = Allowance("monthly", 15_000_000_000, DAY_MS)
DEVELOPER = Allowance("monthly", 150_000_000_000, 8 * HOUR_MS)
REFRESHES_MS = [DAY_MS // parts for parts in (1, 2, 3, 4, 6, 8, 12, 24, 48, 96, 288, 1440)]
MONTHS = [(year, month) for year in (2027, 2028) for month in range(1, 13)]


def _ms(*moment: int) -> int:
    return round(datetime(*moment, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc,arg-type]


def _grants_of_month(allowance: Allowance, year: int, month: int) -> list[int]:
    start_ms = _ms(year, month, 1)
    end_ms = _ms(year + month // 12, month % 12 + 1, 1)
    return [window_at(allowance, at).granted_nano for at in range(start_ms, end_ms, allowance.refresh_ms)]


@pytest.mark.parametrize(("year", "month"), MONTHS)
@pytest.mark.parametrize("allowance", [PROFESSIONAL, DEVELOPER], ids=["15 daily", "150 8-hourly"])
def test_a_months_windows_sum_to_the_monthly_figure(allowance: Allowance, year: int, month: int) -> None:
    grants = _grants_of_month(allowance, year, month)
    assert sum(grants) == allowance.amount_nano
    assert max(grants) - min(grants) <= 1


def test_a_month_has_28_to_31_daily_and_84_to_93_eight_hour_windows() -> None:
    days = {len(_grants_of_month(PROFESSIONAL, *month)) for month in MONTHS}
    eights = {len(_grants_of_month(DEVELOPER, *month)) for month in MONTHS}
    assert days == {28, 29, 30, 31}
    assert eights == {84, 87, 90, 93}


@given(
    amount_nano=st.integers(0, MAX_NANO),
    refresh_ms=st.sampled_from(REFRESHES_MS),
    year=st.integers(1970, 2199),
    month=st.integers(1, 12),
)
def test_any_amount_is_spread_without_a_rest(amount_nano: int, refresh_ms: int, year: int, month: int) -> None:
    grants = _grants_of_month(Allowance("monthly", amount_nano, refresh_ms), year, month)
    assert sum(grants) == amount_nano
    assert max(grants) - min(grants) <= 1


@given(
    now_ms=st.integers(0, _ms(2199, 12, 31)),
    refresh_ms=st.sampled_from(REFRESHES_MS),
    kind=st.sampled_from(["monthly", "per_window"]),
)
def test_windows_follow_each_other_without_gap_and_none_crosses_midnight(
    now_ms: int, refresh_ms: int, kind: str
) -> None:
    allowance = Allowance(kind, 1_000_000_007, refresh_ms)  # type: ignore[arg-type]
    window = window_at(allowance, now_ms)
    assert window.start_ms <= now_ms < window.end_ms == window.start_ms + refresh_ms
    assert window.start_ms // DAY_MS == (window.end_ms - 1) // DAY_MS
    assert window_at(allowance, window.start_ms) == window == window_at(allowance, window.end_ms - 1)
    following = window_at(allowance, window.end_ms)
    assert (following.number, following.start_ms) == (window.number + 1, window.end_ms)


def test_an_allowance_per_window_is_granted_whole_in_each() -> None:
    allowance = Allowance("per_window", 100_000_000, DAY_MS)
    start = datetime(2028, 2, 27, tzinfo=UTC)
    grants = {
        window_at(allowance, _ms(*(start + timedelta(days=day)).timetuple()[:3])).granted_nano for day in range(5)
    }
    assert grants == {100_000_000}


def test_the_leap_day_belongs_to_february() -> None:
    leap_day = window_at(PROFESSIONAL, _ms(2028, 2, 29, 23, 59, 59))
    next_day = window_at(PROFESSIONAL, _ms(2028, 3, 1))
    assert leap_day.end_ms == next_day.start_ms == _ms(2028, 3, 1)
    assert leap_day.granted_nano == 15_000_000_000 - 15_000_000_000 * 28 // 29
    assert next_day.granted_nano == 15_000_000_000 // 31


def test_eight_hour_windows_start_at_0_8_and_16_utc() -> None:
    assert [window_at(DEVELOPER, _ms(2027, 3, 10, hour)).start_ms for hour in (0, 7, 8, 15, 16, 23)] == [
        _ms(2027, 3, 10, start) for start in (0, 0, 8, 8, 16, 16)
    ]
