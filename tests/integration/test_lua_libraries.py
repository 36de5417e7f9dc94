"""The arithmetic of ``credits/lua/lib`` against Python's exact integers, where doubles would go wrong first."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.resources import files

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.domain.money import MAX_NANO
from gateway.domain.plan import DAY_MS, Allowance
from gateway.domain.window import window_at
from tests.conftest import TimedServer

Lua = Callable[..., list[int]]

AMOUNTS = st.one_of(st.integers(0, 1000), st.integers(0, MAX_NANO), st.integers(MAX_NANO - 1000, MAX_NANO))
RATES_PPM = st.one_of(st.sampled_from([1, 333_333, 900_000, 900_001, 999_999, 1_000_000]), st.integers(1, 1_000_000))
on_one_server = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def lua(valkey: TimedServer) -> Lua:
    """Evaluate an expression list over the numbers a, b, c, d, with the libraries in place."""
    libraries = "\n".join(
        (files("gateway.credits") / "lua/lib" / f"{name}.lua").read_text() for name in ("number", "window")
    )

    def evaluate(expressions: str, *numbers: int) -> list[int]:
        script = (
            f"{libraries}\nlocal n = {{}} for i, text in ipairs(ARGV) do n[i] = whole(text, 'n') end\n"
            f"local a, b, c, d = unpack(n)\nlocal out = {{{expressions}}}\n"
            "for i, value in ipairs(out) do out[i] = digits(value) end return out"
        )
        reply = valkey.server.command("EVAL", script, 0, *numbers)
        assert isinstance(reply, list)
        return [int(text) for text in reply]

    return evaluate


@on_one_server
@given(nano=AMOUNTS, rate_ppm=RATES_PPM)
@example(nano=MAX_NANO, rate_ppm=999_999)
def test_at_rate_rounds_up_exactly(lua: Lua, nano: int, rate_ppm: int) -> None:
    assert lua("at_rate(a, b)", nano, rate_ppm) == [-(-nano * rate_ppm // 1_000_000)]


@on_one_server
@given(nano=AMOUNTS, rate_ppm=RATES_PPM, limit=AMOUNTS)
def test_covered_by_rounds_down_exactly(lua: Lua, nano: int, rate_ppm: int, limit: int) -> None:
    assert lua("covered_by(a, b, c)", nano, rate_ppm, limit) == [min(limit, nano * 1_000_000 // rate_ppm)]


@on_one_server
@given(limit=AMOUNTS, rate_ppm=RATES_PPM, off=st.integers(-2, 2))
def test_an_amount_is_covered_by_exactly_what_it_costs_at_the_rate(
    lua: Lua, limit: int, rate_ppm: int, off: int
) -> None:
    nano = min(MAX_NANO, max(0, -(-limit * rate_ppm // 1_000_000) + off))
    assert lua("covered_by(a, b, c)", nano, rate_ppm, limit) == [min(limit, nano * 1_000_000 // rate_ppm)]


@pytest.mark.parametrize(
    "text", ["", "-1", "1.5", "0x10", "1e3", "nan", "inf", " 1", "1 ", str(MAX_NANO + 1), "9" * 40]
)
def test_what_is_not_a_whole_number_within_the_exact_range_is_an_error(valkey: TimedServer, text: str) -> None:
    library = (files("gateway.credits") / "lua/lib/number.lua").read_text()
    reply = valkey.server.command("EVAL", f"{library}\nreturn {{pcall(whole, ARGV[1], 'amount')}}", 0, text)
    assert reply != []
    assert isinstance(reply, list)
    assert reply[0] is None, reply
    assert b"amount is " in reply[1]


def test_a_server_that_counts_with_32_bits_is_refused(valkey: TimedServer) -> None:
    library = (files("gateway.credits") / "lua/lib/number.lua").read_text()
    narrow = "local string = {format = function(_, value) return tostring(value % 2^31) end}\n"
    with pytest.raises(redis.ResponseError, match="a server of 32 bits cannot keep credits"):
        valkey.server.command("EVAL", f"{narrow}{library}\nreturn 1", 0)


def test_numbers_beyond_100_000_credits_are_written_in_full(lua: Lua) -> None:
    assert lua("a, b", MAX_NANO, 10**14 + 1) == [MAX_NANO, 10**14 + 1]


@pytest.mark.parametrize("refresh_ms", [DAY_MS, DAY_MS // 3, DAY_MS // 24])
@pytest.mark.parametrize("amount", [15_000_000_000, 150_000_000_000, 1_000_000_007, MAX_NANO])
def test_every_window_of_2027_and_2028_is_that_of_the_python_twin(lua: Lua, amount: int, refresh_ms: int) -> None:
    """A month of windows per call."""
    allowance = Allowance("monthly", amount, refresh_ms)
    month = datetime(2027, 1, 1, tzinfo=UTC)
    while month.year < 2029:
        following = (month + timedelta(days=31)).replace(day=1)
        start_ms, end_ms = round(month.timestamp() * 1000), round(following.timestamp() * 1000)
        grants = lua(
            "(function() local t, all = {kind = 'monthly', amount = a, refresh = b}, {} "
            "for now = c + b - 1, d, b do local _, _, grant = window_at(t, now) all[#all + 1] = grant end "
            "return unpack(all) end)()",
            *(amount, refresh_ms, start_ms, end_ms),
        )
        assert grants == [window_at(allowance, at).granted_nano for at in range(start_ms, end_ms, refresh_ms)]
        assert sum(grants) == amount
        month = following


@on_one_server
@given(
    now_ms=st.integers(0, 7_258_118_400_000),  # to the year 2200
    amount=AMOUNTS,
    refresh_ms=st.sampled_from([DAY_MS // parts for parts in (1, 2, 3, 24, 96, 1440)]),
)
@example(now_ms=round(datetime(2100, 2, 28, 23, 59, tzinfo=UTC).timestamp() * 1000), amount=MAX_NANO, refresh_ms=DAY_MS)
@example(now_ms=round(datetime(2000, 2, 29, tzinfo=UTC).timestamp() * 1000), amount=MAX_NANO, refresh_ms=DAY_MS)
def test_the_window_of_any_moment_is_that_of_the_python_twin(
    lua: Lua, now_ms: int, amount: int, refresh_ms: int
) -> None:
    window = window_at(Allowance("monthly", amount, refresh_ms), now_ms)
    found = lua("window_at({kind = 'monthly', amount = a, refresh = b}, c)", amount, refresh_ms, now_ms)
    assert found == [window.start_ms, window.end_ms, window.granted_nano]
