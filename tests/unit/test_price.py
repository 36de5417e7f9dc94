"""Prices and costs, against figures worked out by hand."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.metered import Images, Metered
from gateway.domain.price import (
    ANY,
    AUTO,
    FEMTO_PER_NANO,
    Cost,
    Prices,
    Tier,
    TokenPrices,
    cost_of,
    femto_per_unit,
    usd_per_unit,
)

RATE_90_PERCENT = 900_000
#: 0.0305 USD per million tokens: 30.5 nano-credits per token.
CHEAP = femto_per_unit(Decimal("0.0305") / 1_000_000)


def test_30_5_nano_per_token_is_held_exactly() -> None:
    assert CHEAP == 30_500_000
    assert Fraction(CHEAP, FEMTO_PER_NANO) == Fraction("30.5")
    assert usd_per_unit(CHEAP) == Decimal("0.0000000305")


@pytest.mark.parametrize(
    ("tokens", "payg_nano"),
    [(0, 0), (1, 31), (2, 61), (3, 92), (1000, 30_500), (1_000_000, 30_500_000)],
)
def test_a_request_is_rounded_once_and_up(tokens: int, payg_nano: int) -> None:
    """3 × 30.5 = 91.5 → 92; rounded per token it would be 93."""
    prices = Prices(TokenPrices(CHEAP, 0))
    assert prices.cost(Metered(tokens, 0), 1_000_000) == Cost(payg_nano, payg_nano)


def test_parts_of_a_request_are_rounded_together() -> None:
    """One input token at 30.5 and one output token at 0.5 nano are 31, not 31 + 1."""
    assert Prices(TokenPrices(CHEAP, 500_000)).cost(Metered(1, 1), 1_000_000).payg_nano == 31


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
    prices = Prices(TokenPrices(638_000_000, 768_000_000, cache_read_femto=319_000_000))
    assert prices.cost(Metered(1000, 250, cache_read=400), RATE_90_PERCENT) == Cost(702_400, 632_160)


def test_cached_tokens_cost_the_input_price_where_no_other_is_set() -> None:
    prices = Prices(TokenPrices(638_000_000, 768_000_000))
    assert prices.femto(Metered(1000, 0, cache_read=400, cache_write=100)) == prices.femto(Metered(1000, 0))


def test_cache_reads_and_writes_have_their_own_prices() -> None:
    """10 plain at 100, 20 read at 10, 30 written at 125."""
    prices = Prices(TokenPrices(100, 0, cache_read_femto=10, cache_write_femto=125))
    assert prices.femto(Metered(60, 0, cache_read=20, cache_write=30)) == 1000 + 200 + 3750


def test_a_free_cache_read_is_free_and_not_the_input_price() -> None:
    assert Prices(TokenPrices(100, 0, cache_read_femto=0)).femto(Metered(5, 0, cache_read=5)) == 0


@pytest.mark.parametrize(
    ("read", "write", "dearest"), [(None, None, 100), (10, 125, 125), (10, 20, 100), (300, 5, 300)]
)
def test_the_dearest_kind_of_input_token(read: int | None, write: int | None, dearest: int) -> None:
    assert TokenPrices(100, 999, read, write).dearest_input_femto() == dearest


@pytest.mark.parametrize("price", ["0", "0.000000638", "0.000000000000001", "1", "0.00006"])
def test_a_price_survives_the_way_to_femto_and_back(price: str) -> None:
    assert usd_per_unit(femto_per_unit(Decimal(price))) == Decimal(price)


def test_a_price_finer_than_a_femto_credit_is_refused() -> None:
    with pytest.raises(ValueError, match="more decimals than the gateway can charge exactly"):
        femto_per_unit(Decimal("0.0000000000000001"))


# --- costs worked out by hand ---------------------------------------------------------------------------------------


def million(usd: str) -> int:
    """Femto-credits each, of a price in USD per million. 0.638 is 638 nano-credits each."""
    femto = Fraction(usd) * 10**9
    assert femto.denominator == 1
    return int(femto)


def plain(usd: str) -> int:
    """Femto-credits of a plain USD price. 0.04 is 40,000,000 nano-credits."""
    femto = Fraction(usd) * 10**15
    assert femto.denominator == 1
    return int(femto)


def second(usd: str) -> int:
    """Femto-credits per millisecond of a USD price per second. 0.0001 is 100 nano-credits a millisecond."""
    femto = Fraction(usd) * 10**12
    assert femto.denominator == 1
    return int(femto)


def pictures(*kinds: str) -> Metered:
    """Images, each kind as in ``3 1024x1024/high``."""
    split = [kind.replace("/", " ").split() for kind in kinds]
    return Metered(images=tuple(Images(size, quality, int(count)) for count, size, quality in split))


# Behind each: nano-credits, in the order in which they are written.
LLAMA = Prices(TokenPrices(million("0.638"), million("0.768"), cache_read_femto=million("0.319")))  # 638 768 319
SMALL = Prices(TokenPrices(million("0.0305"), million("0.14")))  # 30.5 140
DEEP = Prices(TokenPrices(million("2"), million("8.75"), million("1")))  # 2000 8750, read 1000
CLAUDE = Prices(TokenPrices(million("3"), million("15"), million("0.3"), million("3.75")))  # 3000 15000 300 3750
VOICE = Prices(  # 2500 10000, audio in 40000, out 80000
    TokenPrices(million("2.5"), million("10"), audio_input_femto=million("40"), audio_output_femto=million("80"))
)
PAINTER = Prices(  # 5000 0, images in 10000, out 40000
    TokenPrices(million("5"), 0, image_input_femto=million("10"), image_output_femto=million("40"))
)
THINKER = Prices(TokenPrices(million("1.1"), million("4.4"), reasoning_femto=million("6.6")))  # 1100 4400 6600
FREE_THOUGHT = Prices(TokenPrices(million("1.1"), million("4.4"), reasoning_femto=0))  # 1100 4400 0
LONG = Prices(  # 1250 10000 310; above 200,000: 2500 15000 625
    TokenPrices(million("1.25"), million("10"), million("0.31")),
    (Tier(200_000, TokenPrices(million("2.5"), million("15"), million("0.625"))),),
)
STEPS = Prices(  # 1 10; above 10: 2 10; above 20: 3 20; above 30: 4 20; above 40: 5 30
    TokenPrices(million("0.001"), million("0.01")),
    (
        Tier(10, TokenPrices(million("0.002"), million("0.01"))),
        Tier(20, TokenPrices(million("0.003"), million("0.02"))),
        Tier(30, TokenPrices(million("0.004"), million("0.02"))),
        Tier(40, TokenPrices(million("0.005"), million("0.03"))),
    ),
)
BULK = Prices(TokenPrices(million("0.01"), 0), (Tier(100, TokenPrices(million("0.004"), 0)),))  # 10; above 100: 4
GALLERY = Prices(
    images={
        ("1024x1024", ANY): plain("0.04"),
        ("1024x1024", "high"): plain("0.167"),
        ("1792x1024", "hd"): plain("0.12"),
        (ANY, "high"): plain("0.25"),
        (ANY, "hd"): plain("0.08"),
        (ANY, ANY): plain("0.5"),
    }
)
THUMBNAILS = Prices(images={("256x256", ANY): 0, (ANY, ANY): plain("0.02")})
WHISPER = Prices(audio_ms_femto=second("0.0001"))  # 100 a millisecond
ODD_SECONDS = Prices(audio_ms_femto=second("0.000123457"))  # 123.457 a millisecond
SPEAKER = Prices(character_femto=million("15"))  # 15000
CHEAP_SPEAKER = Prices(character_femto=million("0.0305"))  # 30.5
SEARCH = Prices(request_femto=plain("0.005"))  # 5,000,000
ODD_REQUEST = Prices(request_femto=plain("0.0000001234567"))  # 123.4567
MIXED = Prices(
    TokenPrices(million("0.638"), million("0.768")),
    request_femto=plain("0.005"),
    audio_ms_femto=second("0.0001"),
    character_femto=million("15"),
    images={(ANY, ANY): plain("0.04")},
)
FRACTIONS = Prices(  # 30.5 a token, 123.4567 a request, 123.457 a millisecond, 30.5 a character
    TokenPrices(million("0.0305"), 0),
    request_femto=plain("0.0000001234567"),
    audio_ms_femto=second("0.000123457"),
    character_femto=million("0.0305"),
)
DEAREST = Prices(TokenPrices(million("2000"), million("2000")))  # 2,000,000 2,000,000

#: The prices, the use, the plan's rate, nano-credits at list price and at the rate. The working is beside them.
BY_HAND: list[tuple[Prices, Metered, str, int, int]] = [
    # Input, output, cached input: 638 768 319.
    (LLAMA, Metered(), "0.9", 0, 0),
    (LLAMA, Metered(1), "0.9", 638, 575),  # 574.2
    (LLAMA, Metered(0, 1), "0.9", 768, 692),  # 691.2
    (LLAMA, Metered(1, cache_read=1), "0.9", 319, 288),  # 287.1
    (LLAMA, Metered(1000, 250, cache_read=400), "0.9", 702_400, 632_160),  # 382,800 + 127,600 + 192,000
    (LLAMA, Metered(128_000, 8192), "0.9", 87_955_456, 79_159_911),  # 81,664,000 + 6,291,456; 79,159,910.4
    (LLAMA, Metered(1000, cache_read=1000), "0.9", 319_000, 287_100),
    (LLAMA, Metered(100, cache_write=100), "0.9", 63_800, 57_420),  # at the input price
    (LLAMA, Metered(10, audio_input=5, image_input=5), "0.9", 6380, 5742),  # at the input price
    (LLAMA, Metered(0, 10, audio_output=3, image_output=3, reasoning=4), "0.9", 7680, 6912),  # at the output price
    (CLAUDE, Metered(1000, 10, 700, 200), "0.9", 1_410_000, 1_269_000),  # 300,000 + 210,000 + 750,000 + 150,000
    (CLAUDE, Metered(5, cache_read=5), "0.9", 1500, 1350),
    (CLAUDE, Metered(5, cache_write=5), "0.9", 18_750, 16_875),
    # Rates, of 30.5 a token.
    (SMALL, Metered(3), "1", 92, 92),  # 91.5
    (SMALL, Metered(3, 1), "0.5", 232, 116),  # 231.5; 115.75
    (SMALL, Metered(7), "0.01", 214, 3),  # 213.5; 2.135
    (SMALL, Metered(7), "10", 214, 2135),
    (SMALL, Metered(1), "0.333333", 31, 11),  # 10.1666565
    (SMALL, Metered(4), "0.25", 122, 31),  # 30.5
    (LLAMA, Metered(1000), "1.1", 638_000, 701_800),
    (LLAMA, Metered(1), "0.01", 638, 7),  # 6.38
    (DEAREST, Metered(10_000_000, 10_000_000), "10", 40_000_000_000_000, 400_000_000_000_000),
    # Parts of input and of output with prices of their own.
    (VOICE, Metered(100, 50), "0.9", 750_000, 675_000),  # 250,000 + 500,000
    (VOICE, Metered(7, audio_input=7), "0.9", 280_000, 252_000),
    # 40 × 2500 + 60 × 40,000 + 5 × 10,000 + 45 × 80,000
    (VOICE, Metered(100, 50, audio_input=60, audio_output=45), "0.9", 6_150_000, 5_535_000),
    # 10 × 2500 + 20 × 2500 (cached: no price of its own) + 30 × 40,000
    (VOICE, Metered(60, cache_read=20, audio_input=30), "1", 1_275_000, 1_275_000),
    # 20 × 5000 + 100 × 10,000 + 1056 × 40,000
    (PAINTER, Metered(120, 1056, image_input=100, image_output=1056), "0.9", 43_340_000, 39_006_000),
    (PAINTER, Metered(0, 3), "0.9", 0, 0),
    (THINKER, Metered(10, 100, reasoning=80), "0.9", 627_000, 564_300),  # 11,000 + 88,000 + 528,000
    (THINKER, Metered(0, 100, reasoning=100), "0.9", 660_000, 594_000),
    (DEEP, Metered(0, 10, reasoning=9), "0.9", 87_500, 78_750),  # at the output price
    (FREE_THOUGHT, Metered(0, 10, reasoning=9), "0.9", 4400, 3960),
    # A tier begins above its threshold and is for all of the request.
    (LONG, Metered(199_999), "0.9", 249_998_750, 224_998_875),
    (LONG, Metered(200_000), "0.9", 250_000_000, 225_000_000),
    (LONG, Metered(200_001), "0.9", 500_002_500, 450_002_250),
    (LONG, Metered(200_000, 100), "0.9", 251_000_000, 225_900_000),
    (LONG, Metered(200_001, 100), "0.9", 501_502_500, 451_352_250),
    (LONG, Metered(200_000, cache_read=199_999), "0.9", 62_000_940, 55_800_846),  # 61,999,690 + 1250
    (LONG, Metered(200_001, cache_read=200_000), "0.9", 125_002_500, 112_502_250),  # 125,000,000 + 2500
    (LONG, Metered(1, 300_000), "0.9", 3_000_001_250, 2_700_001_125),  # output opens no tier
    (STEPS, Metered(10, 1), "0.9", 20, 18),  # 10 + 10
    (STEPS, Metered(11, 1), "0.9", 32, 29),  # 22 + 10; 28.8
    (STEPS, Metered(20, 1), "0.9", 50, 45),  # 40 + 10
    (STEPS, Metered(21, 1), "0.9", 83, 75),  # 63 + 20; 74.7
    (STEPS, Metered(30, 1), "0.9", 110, 99),  # 90 + 20
    (STEPS, Metered(31, 1), "0.9", 144, 130),  # 124 + 20; 129.6
    (STEPS, Metered(40, 1), "0.9", 180, 162),  # 160 + 20
    (STEPS, Metered(41, 1), "0.9", 235, 212),  # 205 + 30; 211.5
    (STEPS, Metered(1_000_000, 1), "0.9", 5_000_030, 4_500_027),
    (BULK, Metered(100), "0.9", 1000, 900),
    (BULK, Metered(101), "0.9", 404, 364),  # 363.6: a longer request may cost less
    # Images: the kind itself, then its size, then its quality, then any.
    (GALLERY, pictures(), "0.9", 0, 0),
    (GALLERY, pictures("1 1024x1024/high"), "0.9", 167_000_000, 150_300_000),
    (GALLERY, pictures("3 1024x1024/low"), "0.9", 120_000_000, 108_000_000),
    (GALLERY, pictures("1 1024x1024/hd"), "0.9", 40_000_000, 36_000_000),
    (GALLERY, pictures("2 1792x1024/hd"), "0.9", 240_000_000, 216_000_000),
    (GALLERY, pictures("1 1792x1024/standard"), "0.9", 500_000_000, 450_000_000),
    (GALLERY, pictures("1 512x512/high"), "0.9", 250_000_000, 225_000_000),
    (GALLERY, pictures("4 512x512/hd"), "0.9", 320_000_000, 288_000_000),
    (GALLERY, pictures("1 512x512/low"), "0.9", 500_000_000, 450_000_000),
    (GALLERY, pictures("2 1024x1024/high", "1 512x512/low"), "0.9", 834_000_000, 750_600_000),
    (THUMBNAILS, pictures("10 256x256/low"), "0.9", 0, 0),
    (THUMBNAILS, pictures("10 512x512/low"), "0.9", 200_000_000, 180_000_000),
    # Seconds of audio, held per millisecond.
    (WHISPER, Metered(), "0.9", 0, 0),
    (WHISPER, Metered(audio_ms=1), "0.9", 100, 90),
    (WHISPER, Metered(audio_ms=1000), "0.9", 100_000, 90_000),
    (WHISPER, Metered(audio_ms=61_234), "0.9", 6_123_400, 5_511_060),
    (WHISPER, Metered(1000, 50, audio_ms=10), "0.9", 1000, 900),  # it sells no tokens
    (ODD_SECONDS, Metered(audio_ms=1), "0.9", 124, 112),  # 123.457; 111.1113
    (ODD_SECONDS, Metered(audio_ms=3), "0.9", 371, 334),  # 370.371; 333.3339
    (ODD_SECONDS, Metered(audio_ms=1000), "0.9", 123_457, 111_112),  # 111,111.3
    (ODD_SECONDS, Metered(audio_ms=3_600_000), "0.9", 444_445_200, 400_000_680),
    # Characters.
    (SPEAKER, Metered(characters=1), "0.9", 15_000, 13_500),
    (SPEAKER, Metered(characters=4096), "0.9", 61_440_000, 55_296_000),
    (CHEAP_SPEAKER, Metered(characters=3), "0.9", 92, 83),  # 91.5; 82.35
    (CHEAP_SPEAKER, Metered(characters=7), "0.9", 214, 193),  # 213.5; 192.15
    # Requests.
    (SEARCH, Metered(), "0.9", 0, 0),
    (SEARCH, Metered(requests=1), "0.9", 5_000_000, 4_500_000),
    (SEARCH, Metered(requests=3), "0.9", 15_000_000, 13_500_000),
    (ODD_REQUEST, Metered(requests=1), "0.9", 124, 112),  # 123.4567; 111.11103
    (ODD_REQUEST, Metered(requests=10), "0.9", 1235, 1112),  # 1234.567; 1111.1103
    # Kinds together, rounded once.
    (MIXED, Metered(10, 5, requests=1), "0.9", 5_010_220, 4_509_198),  # 5,000,000 + 6380 + 3840
    (  # the same + 500 × 100 + 7 × 15,000 + 40,000,000
        MIXED,
        Metered(10, 5, images=(Images("1x1", "low", 1),), audio_ms=500, characters=7, requests=1),
        "0.9",
        45_165_220,
        40_648_698,
    ),
    (FRACTIONS, Metered(1, characters=1), "0.9", 61, 55),  # 30.5 + 30.5; 54.9
    (FRACTIONS, Metered(1, audio_ms=1, requests=1), "0.9", 278, 250),  # 30.5 + 123.457 + 123.4567; 249.67233
]


@pytest.mark.parametrize(("prices", "metered", "rate", "payg_nano", "plan_nano"), BY_HAND)
def test_a_cost_by_hand(prices: Prices, metered: Metered, rate: str, payg_nano: int, plan_nano: int) -> None:
    assert prices.cost(metered, int(Fraction(rate) * 10**6)) == Cost(payg_nano, plan_nano)


@pytest.mark.parametrize(
    ("prices", "metered", "nano"),
    [
        (LLAMA, Metered(100, 10), 71_480),  # 63,800 + 7680
        (CLAUDE, Metered(100, 10), 525_000),  # all of it may be written to the cache: 375,000 + 150,000
        (VOICE, Metered(100, 10), 4_800_000),  # all of it may be audio: 4,000,000 + 800,000
        (PAINTER, Metered(100, 10), 1_400_000),  # 1,000,000 + 400,000
        (THINKER, Metered(100, 10), 176_000),  # 110,000 + 66,000
        (FREE_THOUGHT, Metered(100, 10), 154_000),  # none of it may be reasoning: 110,000 + 44,000
        (LONG, Metered(200_000, 100), 251_000_000),  # the tier is out of reach
        (LONG, Metered(200_001, 100), 501_502_500),
        (STEPS, Metered(30, 1), 110),
        (STEPS, Metered(31, 1), 144),
        (STEPS, Metered(41, 1), 235),
        (BULK, Metered(100), 1000),
        (BULK, Metered(101), 1010),  # it may come to fewer tokens, each of them dearer
        (GALLERY, pictures("2 512x512/low"), 1_000_000_000),
        (WHISPER, Metered(1000, 1000, audio_ms=60_000), 6_000_000),
        (SPEAKER, Metered(characters=10), 150_000),
        (SEARCH, Metered(requests=2), 10_000_000),
        (MIXED, Metered(10, 5, audio_ms=500, characters=7, requests=1), 5_165_220),
    ],
)
def test_the_most_that_a_use_can_cost_by_hand(prices: Prices, metered: Metered, nano: int) -> None:
    assert Fraction(prices.most_femto(metered), FEMTO_PER_NANO) == nano


@given(
    st.sampled_from([LLAMA, CLAUDE, VOICE, PAINTER, THINKER, FREE_THOUGHT, STEPS, BULK, MIXED, FRACTIONS]),
    st.lists(st.integers(0, 60), min_size=5, max_size=5),
    st.lists(st.integers(0, 60), min_size=4, max_size=4),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_nothing_within_a_bound_costs_more_than_the_most(
    prices: Prices, inputs: list[int], outputs: list[int], more_input: int, more_output: int
) -> None:
    used = Metered(sum(inputs), sum(outputs), *inputs[:4], *outputs[:3], characters=more_input, requests=1)
    bound = Metered(used.input + more_input, used.output + more_output, characters=more_input, requests=1)
    assert prices.femto(used) <= prices.most_femto(bound)


def test_an_image_of_a_kind_without_a_price_costs_what_the_dearest_does_that_may_be_meant() -> None:
    prices = Prices(images={("1024x1024", ANY): 5, (ANY, "high"): 7, ("512x512", "low"): 9})
    assert (prices.image_femto("1024x1024", "high"), prices.image_femto("8x8", "high")) == (5, 7)
    assert (prices.image_femto("8x8", "low"), prices.image_femto("512x512", AUTO)) == (9, 9)
    assert not prices.sells_image("8x8", "low")
    assert Prices().image_femto("8x8", "low") == 0


def test_an_image_whose_kind_the_upstream_chooses_costs_the_usual_and_holds_the_dearest() -> None:
    prices = Prices(images={("1024x1024", ANY): 5, ("1024x1024", "hd"): 8, ("512x512", ANY): 3})
    assert prices.image_femto("1024x1024", AUTO) == 5
    assert prices.dearest_image("1024x1024", AUTO) == ("1024x1024", "hd")
    assert prices.dearest_image("512x512", AUTO) == ("512x512", ANY)
    assert prices.dearest_image(AUTO, AUTO) == ("1024x1024", "hd")
    assert prices.dearest_image("512x512", "low") == ("512x512", "low")
    # A price for the quality that was asked for is nearer than that for every other.
    rest = Prices(images={("1024x1024", "low"): 1, (ANY, "low"): 2, (ANY, ANY): 9})
    assert rest.image_femto(*rest.dearest_image(AUTO, "low")) == 2
    assert rest.image_femto(*rest.dearest_image("1024x1024", AUTO)) == 9
    assert rest.image_femto(AUTO, "low") == 2
