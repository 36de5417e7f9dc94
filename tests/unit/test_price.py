"""Prices and costs, against figures worked out by hand."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.price import (
    FEMTO_PER_NANO,
    Cost,
    TokenPrices,
    Tokens,
    cost_of,
    femto_per_token,
    usd_per_token,
)

RATE_90_PERCENT = 900_000
#: 0.0305 USD per million tokens: 30.5 nano-credits per token.
CHEAP = femto_per_token(Decimal("0.0305") / 1_000_000)


def test_30_5_nano_per_token_is_held_exactly() -> None:
    assert CHEAP == 30_500_000
    assert Fraction(CHEAP, FEMTO_PER_NANO) == Fraction("30.5")
    assert usd_per_token(CHEAP) == Decimal("0.0000000305")


@pytest.mark.parametrize(
    ("tokens", "payg_nano"),
    [(0, 0), (1, 31), (2, 61), (3, 92), (1000, 30_500), (1_000_000, 30_500_000)],
)
def test_a_request_is_rounded_once_and_up(tokens: int, payg_nano: int) -> None:
    """3 × 30.5 = 91.5 → 92; rounded per token it would be 93."""
    prices = TokenPrices(CHEAP, 0)
    assert prices.cost(Tokens(tokens, 0), 1_000_000) == Cost(payg_nano, payg_nano)


def test_parts_of_a_request_are_rounded_together() -> None:
    """One input token at 30.5 and one output token at 0.5 nano are 31, not 31 + 1."""
    assert TokenPrices(CHEAP, 500_000).cost(Tokens(1, 1), 1_000_000).payg_nano == 31


@pytest.mark.parametrize(
    ("femto", "cost"),
    [
        (0, Cost(0, 0)),
        (1, Cost(1, 1)),
        (1_000_000, Cost(1, 1)),
        (10_000_000, Cost(10, 9)),
        (30_500_000, Cost(31, 28)),
        # 1.1 nano: 2 at list price; at the rate 0.99 → 1. Rounded twice (0.9 × 2 = 1.8) it would be 2.
        (1_100_000, Cost(2, 1)),
        # 11.111111 nano: 9.9999999 → 10 at the rate; rounded twice (0.9 × 12 = 10.8) it would be 11.
        (11_111_111, Cost(12, 10)),
        (11_111_112, Cost(12, 11)),
    ],
)
def test_the_plans_rate_is_taken_from_the_exact_figure(femto: int, cost: Cost) -> None:
    assert cost_of(femto, RATE_90_PERCENT) == cost


@given(st.integers(0, 10**24), st.integers(1, 1_000_000))
def test_a_cost_is_never_below_the_exact_one_and_less_than_a_nano_above(femto: int, rate_ppm: int) -> None:
    cost = cost_of(femto, rate_ppm)
    exact = Fraction(femto, FEMTO_PER_NANO)
    assert 0 <= cost.payg_nano - exact < 1
    assert 0 <= cost.plan_nano - exact * rate_ppm / 1_000_000 < 1
    assert cost.plan_nano <= cost.payg_nano


def test_llama_70b_by_hand() -> None:
    """1,000 input tokens, 400 of them cached, and 250 output tokens at 0.638, 0.319 and 0.768 USD per million.

    600 × 638 + 400 × 319 + 250 × 768 = 702,400 nano-credits; at 0.9: 632,160.
    """
    prices = TokenPrices(638_000_000, 768_000_000, cache_read_femto=319_000_000)
    assert prices.cost(Tokens(1000, 250, cache_read=400), RATE_90_PERCENT) == Cost(702_400, 632_160)


def test_cached_tokens_cost_the_input_price_where_no_other_is_set() -> None:
    prices = TokenPrices(638_000_000, 768_000_000)
    assert prices.femto(Tokens(1000, 0, cache_read=400, cache_write=100)) == prices.femto(Tokens(1000, 0))


def test_cache_reads_and_writes_have_their_own_prices() -> None:
    """10 plain at 100, 20 read at 10, 30 written at 125."""
    prices = TokenPrices(100, 0, cache_read_femto=10, cache_write_femto=125)
    assert prices.femto(Tokens(60, 0, cache_read=20, cache_write=30)) == 1000 + 200 + 3750


def test_a_free_cache_read_is_free_and_not_the_input_price() -> None:
    assert TokenPrices(100, 0, cache_read_femto=0).femto(Tokens(5, 0, cache_read=5)) == 0


@pytest.mark.parametrize(
    ("read", "write", "dearest"), [(None, None, 100), (10, 125, 125), (10, 20, 100), (300, 5, 300)]
)
def test_the_dearest_kind_of_input_token(read: int | None, write: int | None, dearest: int) -> None:
    assert TokenPrices(100, 999, read, write).dearest_input_femto() == dearest


@pytest.mark.parametrize("price", ["0", "0.000000638", "0.000000000000001", "1", "0.00006"])
def test_a_price_survives_the_way_to_femto_and_back(price: str) -> None:
    assert usd_per_token(femto_per_token(Decimal(price))) == Decimal(price)


def test_a_price_finer_than_a_femto_credit_is_refused() -> None:
    with pytest.raises(ValueError, match="more decimals than the gateway can charge exactly"):
        femto_per_token(Decimal("0.0000000000000001"))
