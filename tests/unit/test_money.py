"""Credits as text and as integers."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.money import MAX_NANO, NANO_PER_CREDIT, AmountError, format_credits, parse_credits


@given(st.integers(0, MAX_NANO))
def test_every_amount_survives_the_way_to_text_and_back(nano: int) -> None:
    assert parse_credits(format_credits(nano)) == nano


@given(st.integers(-MAX_NANO, MAX_NANO))
def test_the_text_is_the_exact_decimal(nano: int) -> None:
    text = format_credits(nano)
    assert Decimal(text) * NANO_PER_CREDIT == nano
    assert "e" not in text.lower()


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("0", 0),
        ("15", 15_000_000_000),
        ("12.50", 12_500_000_000),
        ("007", 7_000_000_000),
        ("0.000000001", 1),
        ("0.000000638", 638),
        ("1.1", 1_100_000_000),
        ("4503599.627370495", MAX_NANO),
    ],
)
def test_a_decimal_is_read_exactly(text: str, nano: int) -> None:
    assert parse_credits(text) == nano


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (-1, "-0.000000001"),
        (10 * NANO_PER_CREDIT, "10"),
        (-1_500_000_000, "-1.5"),
        (100_000_000_000_001, "100000.000000001"),
    ],
)
def test_an_amount_is_written_without_exponent_or_trailing_zeros(nano: int, text: str) -> None:
    assert format_credits(nano) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-1", "+1", "1e3", "0x10", "nan", "inf", "1,5", "1_000", ".5", "5.", " 5", "5 ", "5\n"),
        *("0.0000000001", "1.1234567890", "12345678", "٣", "½", "1.5.5", "$5"),
    ],
)
def test_anything_but_a_plain_decimal_is_refused(text: str) -> None:
    with pytest.raises(AmountError, match="is not an amount of credits"):
        parse_credits(text)


@pytest.mark.parametrize("text", ["4503599.627370496", "9999999"])
def test_more_than_an_account_can_hold_is_refused(text: str) -> None:
    with pytest.raises(AmountError, match=r"more than an account can hold \(4503599\.627370495\)"):
        parse_credits(text)


@given(st.text())
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    try:
        nano = parse_credits(text)
    except AmountError:
        return
    assert Decimal(text) * NANO_PER_CREDIT == nano
