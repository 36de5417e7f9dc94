"""What upstreams' lists and price files say, read in their own units, exactly."""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pricebook import sources
from gateway.pricebook.offer import Offer, Place, Refused, check, completed, in_file, sold_by, without_empty_prices
from gateway.pricebook.price_file import read_price_file
from gateway.pricebook.sources import Source, SourceError, from_file
from gateway.pricebook.upstream_list import UnknownShape, read_list

PRICE_FILE = Path(__file__).parents[1] / "price_file.json"


def exact(document: object) -> object:
    """As a source's JSON is read."""
    return sources._parsed(json.dumps(document).encode())


def entry(**fields: Any) -> Offer | Refused:
    """What a list of one model says of it."""
    return read_list(exact({"object": "list", "data": [{"id": "m", "object": "model", **fields}]}))["m"]


def figures(offer: Offer | Refused | None) -> dict[str, str]:
    """The offer's figures as people read them."""
    assert isinstance(offer, Offer), offer
    return {" ".join(map(str, place)): f"{figure.normalize():f}" for place, figure in offer.figures.items()}


def refusal(offer: Offer | Refused) -> str:
    assert isinstance(offer, Refused), offer
    return str(offer)


# --- lists ------------------------------------------------------------------------------------------------------------


def test_ionets_list_has_numbers_per_token() -> None:
    offer = entry(
        input_token_price=6.38e-07,
        output_token_price=7.68e-07,
        cache_read_token_price=3e-07,
        cache_write_token_price=None,
        context_window=128000,
        max_tokens=8192,
        supports_images_input=False,
    )
    assert figures(offer) == {
        "input_token_price": "0.000000638",
        "output_token_price": "0.000000768",
        "cache_read_token_price": "0.0000003",
        "context_window": "128000",
        "max_output_tokens": "8192",
    }


def test_ionets_openapi_has_texts_per_million_tokens_in_metadata() -> None:
    offer = entry(
        metadata={
            "input_token_price": "0.638",
            "output_token_price": "0.768",
            "cache_read_token_price": "0.3",
            "context_window": "128000",
            "max_tokens": 8192,
        }
    )
    assert figures(offer) == {
        "input_token_price": "0.000000638",
        "output_token_price": "0.000000768",
        "cache_read_token_price": "0.0000003",
        "context_window": "128000",
        "max_output_tokens": "8192",
    }


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"input_token_price": "0.638"}, "input_token_price is '0.638', where a number in USD per token was expected"),
        ({"input_token_price": True}, "input_token_price is True"),
        ({"metadata": {"input_token_price": 6.38e-07}}, "metadata.input_token_price is 0.000000638, where a number in"),
        ({"metadata": {"input_token_price": "-1"}}, "metadata.input_token_price is '-1'"),
        ({"metadata": {"input_token_price": "free"}}, "metadata.input_token_price is 'free'"),
        ({"pricing": {"prompt": "-1", "completion": "-1"}}, "has no fixed price"),
        ({"pricing": {"prompt": 0.1, "completion": "1"}}, "pricing.prompt is 0.1, where a number in quotes"),
        ({"input_token_price": 1e-06, "context_window": "many"}, "context_window is no number"),
        (
            {"input_token_price": 1e-06, "output_token_price": 1e-06, "pricing": {"prompt": "2e-6", "completion": "1"}},
            "says two different input_token_prices",
        ),
        ({"input_token_price": 1e-06, "tiers": [{"input_token_price": 1e-06}]}, "has a tier without above_input"),
    ],
)
def test_a_price_whose_unit_cannot_be_told_is_refused(fields: dict[str, Any], problem: str) -> None:
    assert problem in refusal(entry(**fields))


def test_a_model_with_its_prices_in_both_of_ionets_places_is_taken_once() -> None:
    fields: dict[str, Any] = {"input_token_price": 6.38e-07, "output_token_price": 7.68e-07}
    said_again = {"metadata": {"input_token_price": "0.638", "output_token_price": "0.768"}}
    assert entry(**fields, **said_again) == entry(**fields)


def test_openrouters_prices_of_zero_are_no_prices_of_their_own() -> None:
    offer = entry(
        context_length=200000,
        pricing={
            "prompt": "0.000003",
            "completion": "0.000015",
            "request": "0",
            "image": "0.0048",
            "web_search": "0.01",
            "internal_reasoning": "0",
            "input_cache_read": "0.0000003",
            "input_cache_write": "0.00000375",
            "audio": "0",
            "audio_output": None,
            "discount": 0,
        },
        top_provider={"context_length": 200000, "max_completion_tokens": 64000, "is_moderated": True},
    )
    assert figures(offer) == {
        "input_token_price": "0.000003",
        "output_token_price": "0.000015",
        "cache_read_token_price": "0.0000003",
        "cache_write_token_price": "0.00000375",
        "context_window": "200000",
        "max_output_tokens": "64000",
    }
    assert isinstance(offer, Offer) and offer.notes == ("pricing.image '0.0048'", "pricing.web_search '0.01'")


def test_a_free_model_of_openrouter_is_free() -> None:
    offer = entry(pricing={"prompt": "0", "completion": "0"}, context_length=8192)
    assert figures(offer) == {"input_token_price": "0", "output_token_price": "0", "context_window": "8192"}


def test_a_gateways_own_list_is_read_whole() -> None:
    offer = entry(
        request_price=0.005,
        second_price=0.0001,
        image_prices={"1024x1024": 0.04, "*/high": 0.25},
        tiers=[{"above_input_tokens": 200000, "input_token_price": 2.5e-06}],
        input_token_price=1.25e-06,
        output_token_price=1e-05,
    )
    assert figures(offer) == {
        "input_token_price": "0.00000125",
        "output_token_price": "0.00001",
        "request_price": "0.005",
        "second_price": "0.0001",
        "image_prices 1024x1024": "0.04",
        "image_prices */high": "0.25",
        "tiers 200000 input_token_price": "0.0000025",
    }


def test_no_answer_is_longer_than_the_window_that_the_list_says() -> None:
    offer = entry(input_token_price=1e-06, output_token_price=1e-06, context_window=4096, max_tokens=100000)
    assert figures(offer)["max_output_tokens"] == "4096"


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"models": []}, "is no list of models"),
        ("nothing", "is no list of models"),
        ({"data": []}, "has 0 models and no price"),
        # OpenAI's own list, and Together's, whose pricing is in a unit of its own.
        ({"data": [{"id": "gpt-4o", "object": "model", "owned_by": "system"}]}, "has 1 models and no price"),
        ({"data": [{"id": "m", "pricing": {"input": 0.2, "output": 0.2, "hourly": 0}}]}, "has 1 models and no price"),
    ],
)
def test_a_list_of_another_shape_is_said_to_be_one(document: object, problem: str) -> None:
    with pytest.raises(UnknownShape, match=problem):
        read_list(exact(document))


# --- price files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def price_file() -> Source:
    return from_file(PRICE_FILE, None)


def offered(source: Source, model: str, unit: str = "usd_per_million_tokens") -> dict[str, str]:
    """What a new model would be given, as models.yaml writes it."""
    offer = source.offers[model]
    assert isinstance(offer, Offer)
    offer = completed(sold_by(without_empty_prices(offer), None))
    check(offer.figures)
    return {" ".join(map(str, place)): in_file(place, figure, unit) for place, figure in offer.figures.items()}  # type: ignore[arg-type]


def notes(source: Source, model: str) -> tuple[str, ...]:
    offer = source.offers[model]
    assert isinstance(offer, Offer)
    return sold_by(without_empty_prices(offer), None).notes


SIZES_4O = {"context_window": "128000", "max_output_tokens": "16384"}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (
            "gpt-4o",
            {"input_token_price": "2.5", "output_token_price": "10", "cache_read_token_price": "1.25", **SIZES_4O},
        ),
        (
            "gpt-4o-audio-preview",
            {
                "input_token_price": "2.5",
                "output_token_price": "10",
                "audio_input_token_price": "40",
                "audio_output_token_price": "80",
                **SIZES_4O,
            },
        ),
        (
            "claude-sonnet-4-5",
            {
                "input_token_price": "3",
                "output_token_price": "15",
                "cache_write_token_price": "3.75",
                "cache_read_token_price": "0.3",
                "tiers 200000 input_token_price": "6",
                "tiers 200000 output_token_price": "22.5",
                "tiers 200000 cache_write_token_price": "7.5",
                "tiers 200000 cache_read_token_price": "0.6",
                "context_window": "1000000",
                "max_output_tokens": "64000",
            },
        ),
        (
            "deepseek/deepseek-chat",
            {
                "input_token_price": "0.28",
                "output_token_price": "0.42",
                "cache_read_token_price": "0.028",
                "context_window": "131072",
                "max_output_tokens": "8192",
            },
        ),
        (
            "dashscope/qwen-flash",
            {
                "input_token_price": "0.05",
                "output_token_price": "0.4",
                "tiers 256000 input_token_price": "0.25",
                "tiers 256000 output_token_price": "2",
                "context_window": "997952",
                "max_output_tokens": "32768",
            },
        ),
        (
            "text-embedding-3-small",
            {
                "input_token_price": "0.02",
                "output_token_price": "0",
                "context_window": "8191",
                "max_output_tokens": "1",
            },
        ),
        ("whisper-1", {"second_price": "0.0001"}),
        ("tts-1", {"character_price": "15"}),
        ("rerank-v3.5", {"request_price": "0.002"}),
        # 3.81469e-08 × 1024 × 1024, and not the 0.04 that it was worked out from.
        ("dall-e-3", {"image_prices 1024x1024": "0.0399999238144", "image_prices 1024x1792/hd": "0.12"}),
        ("azure/gpt-image-1", {"image_prices 1024x1024/high": "0.167"}),
        ("vertex_ai/imagen-4.0", {"image_prices *": "0.04"}),
    ],
)
def test_what_a_price_file_says_of_a_model(price_file: Source, model: str, fields: dict[str, str]) -> None:
    assert offered(price_file, model) == fields


def test_in_a_file_per_token_the_same_figures_are_a_million_times_smaller(price_file: Source) -> None:
    assert offered(price_file, "tts-1", "usd_per_token") == {"character_price": "0.000015"}
    assert offered(price_file, "gpt-4o-mini", "usd_per_token")["cache_read_token_price"] == "0.000000075"
    assert offered(price_file, "rerank-v3.5", "usd_per_token") == {"request_price": "0.002"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        # Batches and priority are other services, and not worth a word.
        ("gpt-4o", ()),
        ("gpt-4o-mini", ("search_context_cost_per_query (several figures)",)),
        ("claude-sonnet-4-5", ("cache_creation_input_token_cost_above_1hr 0.000006",)),
        ("openai/sora-2", ("output_cost_per_video_per_second 0.1",)),
        # Both would be charged.
        ("gpt-4o-transcribe", ("second_price 0.0001 USD, because the model is sold by tokens",)),
        # As a price it would make what is written to the cache free.
        ("deepseek/deepseek-chat", ("cache_write_token_price 0, beside input_token_prices that are not 0",)),
    ],
)
def test_a_price_that_cannot_be_taken_over_is_named(price_file: Source, model: str, said: tuple[str, ...]) -> None:
    assert notes(price_file, model) == said


def test_a_price_per_request_stands_beside_those_of_tokens(price_file: Source) -> None:
    assert (
        offered(price_file, "perplexity/sonar").items() >= {"request_price": "0.005", "input_token_price": "1"}.items()
    )


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("in-another-unit", "input_token_price is 3 USD per token, which is 3000000 per million: a price is 0 or from"),
        ("of-floating-points", "input_token_price has more decimals than the gateway can charge exactly"),
        ("openai/sora-2", "has no price that the gateway could charge"),
    ],
)
def test_figures_that_must_not_be_charged_are_refused(price_file: Source, model: str, problem: str) -> None:
    with pytest.raises(Refused, match=re.escape(problem)):
        offered(price_file, model)


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({("input_token_price",): "0.0000000001"}, "is 0.0000000001 USD per token, which is 0.0001 per million"),
        ({("input_token_price",): "-0.000001"}, "is -0.000001 USD per token"),
        ({("character_price",): "15"}, "character_price is 15 USD per character"),
        ({("second_price",): "6"}, "second_price is 6 USD per second"),
        ({("request_price",): "1000"}, "request_price is 1000 USD per request"),
        ({("image_prices", "*"): "0.00000004"}, r"image_prices \* is 0.00000004 USD per image"),
        ({("image_prices", "large"): "0.04"}, "image_prices large is no kind of image"),
        ({("context_window",): "0.5"}, "context_window is 0.5, not a whole number"),
        ({("tiers", above, "input_token_price"): "0.000001" for above in range(1, 6)}, "has 5 tiers by length"),
        ({("context_window",): "10", ("max_output_tokens",): "11"}, "max_output_tokens is 11, more than the context"),
    ],
)
def test_an_implausible_figure_is_refused(figures: Mapping[Place, str], problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        check({place: Decimal(figure) for place, figure in figures.items()})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[]", "is no price file"),
        (b"{}", "has no price"),
        (b'{"m": {"mode": "chat"}}', "has no price"),
        (b'{"m": {"input_cost_per_token": NaN}}', "has NaN, which is no number"),
        (b'{"m": {"input_cost_per_token": 1e999999999}}', "has more digits than any price"),
        (b'{"m": {"input_cost_per_token": ' + b"1" * 5000 + b"}}", "has more digits than any price"),
        (b'{"a":' * 100_000, "is nested too deep"),
    ],
    ids=range(9),
)
def test_a_file_that_is_no_price_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "prices.json"
    file.write_bytes(content)
    with pytest.raises(SourceError, match=f"price file {re.escape(str(file))}: .*{problem}"):
        from_file(file, None)


FIELDS = st.sampled_from(
    "id input_token_price output_token_price cache_read_token_price request_price image_prices tiers metadata pricing "
    "prompt completion context_window max_tokens context_length top_provider max_completion_tokens above_input_tokens "
    "input_cost_per_token output_cost_per_token input_cost_per_token_above_200k_tokens tiered_pricing range mode "
    "input_cost_per_second input_cost_per_image max_input_tokens 1024x1024".split()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["0.5", "-1", "3e-07", "chat", "embedding", "image_generation", "audio_transcription"])
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=3), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.dictionaries(FIELDS, VALUES, max_size=8), st.sampled_from(["m", "hd/1024-x-1024/m", "1-x-1/max-steps/m"]))
def test_whatever_a_source_says_is_an_offer_a_refusal_or_of_an_unknown_shape(fields: dict[str, Any], name: str) -> None:
    for read, document in ((read_list, {"data": [{**fields, "id": "m"}]}), (read_price_file, {name: fields})):
        try:
            offers = read(exact(document))
        except (UnknownShape, ValueError):  # the latter of numbers with too many digits
            continue
        for offer in offers.values():
            if isinstance(offer, Refused):
                continue
            try:
                whole = completed(sold_by(without_empty_prices(offer), None))
                check(whole.figures)
            except Refused:
                continue
            for place, figure in whole.figures.items():
                assert re.fullmatch(r"[0-9]+(\.[0-9]+)?", in_file(place, figure, "usd_per_million_tokens"))


def test_a_file_is_read_to_a_limit_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        from_file(tmp_path / "none.json", None)
    monkeypatch.setattr(sources, "MOST_FILE_BYTES", 2**20)
    file = tmp_path / "prices.json"
    file.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(SourceError, match="is larger than 1 MiB"):
        from_file(file, None)
    monkeypatch.setattr(sources, "MOST_MODELS", 3)
    with pytest.raises(SourceError, match="has more than 3 models"):
        from_file(PRICE_FILE, None)
