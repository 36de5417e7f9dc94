"""What models.yaml says of prices of every kind becomes what is charged, and what GET /v1/models shows."""

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from jsonschema import Draft202012Validator

from gateway.config.changes import changes
from gateway.config.load import ConfigError, load
from gateway.config.model import GatewayConfig
from gateway.config.schema import json_schema
from gateway.domain.price import ANY, Prices, Tier, TokenPrices
from gateway.http.models import ModelsList
from gateway.upstream.client import UpstreamClient
from tests.upstreams.local import LocalUpstream

TOKENS: dict[str, Any] = {
    "input_token_price": 1,
    "output_token_price": 2,
    "context_window": 4096,
    "max_output_tokens": 512,
}
EVERYTHING: dict[str, Any] = {
    **TOKENS,
    "cache_read_token_price": "0.1",
    "cache_write_token_price": "1.25",
    "audio_input_token_price": 40,
    "image_input_token_price": 5,
    "audio_output_token_price": 80,
    "image_output_token_price": "32.5",
    "reasoning_token_price": 3,
    "tiers": [
        {"above_input_tokens": 1000, "input_token_price": 2, "reasoning_token_price": 4},
        {"above_input_tokens": 2000, "output_token_price": 5},
    ],
    "request_price": "0.0050",
    "second_price": "0.0001",
    "character_price": 15,
    "image_prices": {"1024x1024": "0.040", "1024x1024/high": "0.167", "*/high": "0.25", "*": 1},
}


def config(
    tmp_path: Path,
    models: dict[str, dict[str, Any]],
    unit: str = "usd_per_million_tokens",
    upstream: str = "http://127.0.0.1:8000/v1",
) -> GatewayConfig:
    """What these models, with one upstream, are read as. Raises ConfigError."""
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(document(models, unit, upstream), sort_keys=False), encoding="utf-8")
    return load(file, {})


def document(
    models: dict[str, dict[str, Any]],
    unit: str = "usd_per_million_tokens",
    upstream: str = "http://127.0.0.1:8000/v1",
) -> dict[str, Any]:
    return {
        "upstreams": {"local": {"base_url": upstream}},
        "plans": {"standard": {"default": True}},
        "models": {
            "price_unit": unit,
            "models": {name: {"upstream": "local", **model} for name, model in models.items()},
        },
    }


def prices(tmp_path: Path, unit: str = "usd_per_million_tokens", **model: Any) -> Prices:
    """What one model costs."""
    return config(tmp_path, {"m": model}, unit).models["m"].prices


def version(tmp_path: Path, model: dict[str, Any]) -> str:
    return config(tmp_path, {"m": model}).models["m"].price_version


# --- what is read ---------------------------------------------------------------------------------------------------


def test_every_price_is_held_exactly(tmp_path: Path) -> None:
    base = TokenPrices(
        input_femto=10**9,
        output_femto=2 * 10**9,
        cache_read_femto=10**8,
        cache_write_femto=1_250_000_000,
        audio_input_femto=40 * 10**9,
        image_input_femto=5 * 10**9,
        audio_output_femto=80 * 10**9,
        image_output_femto=32_500_000_000,
        reasoning_femto=3 * 10**9,
    )
    rest = (10**8, 1_250_000_000, 40 * 10**9, 5 * 10**9, 80 * 10**9, 32_500_000_000)
    assert prices(tmp_path, **EVERYTHING) == Prices(
        tokens=base,
        tiers=(
            Tier(1000, TokenPrices(2 * 10**9, 2 * 10**9, *rest, 4 * 10**9)),
            Tier(2000, TokenPrices(10**9, 5 * 10**9, *rest, 3 * 10**9)),
        ),
        request_femto=5 * 10**12,
        audio_ms_femto=10**8,
        character_femto=15 * 10**9,
        images={
            ("1024x1024", ANY): 4 * 10**13,
            ("1024x1024", "high"): 167 * 10**12,
            (ANY, "high"): 25 * 10**13,
            (ANY, ANY): 10**15,
        },
    )


def test_only_tokens_and_characters_are_in_the_files_unit(tmp_path: Path) -> None:
    written: dict[str, Any] = {"request_price": 1, "second_price": 1, "image_prices": {"*": 1}}
    per_token = prices(tmp_path, "usd_per_token", **written, character_price="1.5e-5")
    assert per_token == prices(tmp_path, **written, character_price=15)
    assert per_token.character_femto == 15 * 10**9
    assert (per_token.request_femto, per_token.audio_ms_femto, per_token.image_femto("x", "y")) == (
        10**15,
        10**12,
        10**15,
    )


def test_a_tier_s_cached_tokens_cost_its_own_input_price_where_the_model_has_none_for_them(tmp_path: Path) -> None:
    tier = prices(tmp_path, **TOKENS, tiers=[{"above_input_tokens": 9, "input_token_price": 3}]).tiers[0]
    assert (tier.tokens.cache_read, tier.tokens.input_femto, tier.tokens.output_femto) == (
        3 * 10**9,
        3 * 10**9,
        2 * 10**9,
    )


@pytest.mark.parametrize(
    "only", [{"request_price": "0.01"}, {"second_price": 0}, {"character_price": 15}, {"image_prices": {"*": 0}}]
)
def test_a_model_may_sell_no_tokens(tmp_path: Path, only: dict[str, Any]) -> None:
    model = config(tmp_path, {"m": only}).models["m"]
    assert (model.prices.tokens, model.context_window, model.max_output_tokens) == (None, 0, 0)
    named = config(tmp_path, {"m": {**only, "context_window": 512, "max_output_tokens": 5}}).models["m"]
    assert (named.prices, named.context_window, named.max_output_tokens) == (model.prices, 512, 5)


def test_what_is_sold_for_nothing_is_not_what_is_not_sold(tmp_path: Path) -> None:
    free = prices(tmp_path, second_price=0)
    assert (free.audio_ms_femto, free.request_femto, free.character_femto) == (0, None, None)


def test_prices_cannot_be_changed_once_read(tmp_path: Path) -> None:
    images: Any = prices(tmp_path, image_prices={"*": 1}).images
    with pytest.raises(TypeError):
        images[ANY, ANY] = 0


@pytest.mark.parametrize(
    ("name", "price", "plausible"),
    [
        ("request_price", "0", True),
        ("request_price", "1e-7", True),
        ("request_price", "9e-8", False),
        ("request_price", "100", True),
        ("request_price", "100.01", False),
        ("second_price", "0.0", True),
        ("second_price", "1e-7", True),
        ("second_price", "9.9e-8", False),
        ("second_price", "1", True),
        ("second_price", "1.000001", False),
        ("character_price", "0", True),
        ("character_price", "0.001", True),
        ("character_price", "0.0009", False),
        ("character_price", "2000", True),
        ("character_price", "2000.1", False),
        ("second_price", "0.000000000001", False),
        ("second_price", "0.000100000001", True),
        ("second_price", "0.0001000000001", False),
        ("request_price", "0.000001000000001", True),
        ("request_price", "-1", False),
        ("request_price", "1_0", False),
    ],
)
def test_prices_beside_tokens_at_the_edges(tmp_path: Path, name: str, price: str, plausible: bool) -> None:
    if plausible:
        prices(tmp_path, **{name: price})
    else:
        with pytest.raises(ConfigError, match=rf"models\.models\.m\.{name} "):
            prices(tmp_path, **{name: price})


@pytest.mark.parametrize(
    ("price", "plausible"), [("0", True), ("0.0001", True), ("0.00009", False), ("100", True), ("100.5", False)]
)
def test_image_prices_at_the_edges(tmp_path: Path, price: str, plausible: bool) -> None:
    if plausible:
        prices(tmp_path, image_prices={"*": price})
    else:
        with pytest.raises(ConfigError, match=r"models\.models\.m\.image_prices\.\* "):
            prices(tmp_path, image_prices={"*": price})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("1024x1024", ("1024x1024", ANY)),
        ("1024x1024/high", ("1024x1024", "high")),
        ("*/hd", (ANY, "hd")),
        ("*", (ANY, ANY)),
    ],
)
def test_kinds_of_images(tmp_path: Path, key: str, kind: tuple[str, str]) -> None:
    assert dict(prices(tmp_path, image_prices={key: 1}).images) == {kind: 10**15}


@pytest.mark.parametrize(
    "key",
    [
        "high",
        "1024",
        "1024X1024",
        "01024x1024",
        "1024x1024/*",
        "*/*",
        "1024x1024/",
        "/high",
        "1024x1024/a b",
        "",
        "auto",
    ],
)
def test_what_is_no_kind_of_image(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="is no kind of image"):
        prices(tmp_path, image_prices={key: 1})
    assert not Draft202012Validator(json_schema()).is_valid(document({"m": {"image_prices": {key: 1}}}))


def test_four_tiers_are_allowed(tmp_path: Path) -> None:
    tiers = [{"above_input_tokens": count, "input_token_price": 0} for count in (1, 2, 3, 10_000_000)]
    assert [tier.above_input_tokens for tier in prices(tmp_path, **TOKENS, tiers=tiers).tiers] == [1, 2, 3, 10**7]


def test_the_schema_accepts_what_is_read() -> None:
    schema = Draft202012Validator(json_schema())
    for model in (EVERYTHING, TOKENS, {"second_price": 1e-5}, {"image_prices": {"*": "${PRICE}"}}):
        schema.validate(document({"m": model}))


# --- versions and changes -------------------------------------------------------------------------------------------


def _each_changed() -> Iterable[dict[str, Any]]:
    """EVERYTHING, once for each figure in it, with that figure changed."""
    for name in EVERYTHING:
        if name.endswith("_price"):
            yield {**EVERYTHING, name: "0.0011"}
    for key in EVERYTHING["image_prices"]:
        yield {**EVERYTHING, "image_prices": {**EVERYTHING["image_prices"], key: "0.0011"}}
    for index, tier in enumerate(EVERYTHING["tiers"]):
        for changed in (
            {"above_input_tokens": 1500 if index == 0 else 2500},
            {"input_token_price": 9},
            {"image_output_token_price": 9},
        ):
            tiers = list(EVERYTHING["tiers"])
            tiers[index] = {**tier, **changed}
            yield {**EVERYTHING, "tiers": tiers}
    yield {**EVERYTHING, "tiers": EVERYTHING["tiers"][:1]}
    yield {**EVERYTHING, "image_prices": {"*": 1}}


def test_another_figure_is_another_version_and_a_change(tmp_path: Path) -> None:
    before = config(tmp_path, {"m": EVERYTHING})
    versions = [before.models["m"].price_version]
    for model in _each_changed():
        after = config(tmp_path, {"m": model})
        assert changes(before, after).applied == ("models.m changed",)
        versions.append(after.models["m"].price_version)
    assert len(set(versions)) == len(versions) == 1 + 12 + 4 + 6 + 2


def test_the_same_prices_are_no_change(tmp_path: Path) -> None:
    assert changes(config(tmp_path, {"m": EVERYTHING}), config(tmp_path, {"m": EVERYTHING})).applied == ()


def test_another_notation_is_the_same_version(tmp_path: Path) -> None:
    images = dict(reversed(EVERYTHING["image_prices"].items()))
    assert version(tmp_path, EVERYTHING) == version(
        tmp_path, {**EVERYTHING, "request_price": "5e-3", "image_prices": images, "context_window": 5000}
    )


@pytest.mark.parametrize(
    "written",
    [
        {"audio_input_token_price": 1},
        {"image_input_token_price": "1.0"},
        {"audio_output_token_price": 2},
        {"reasoning_token_price": 2, "cache_read_token_price": 1},
        {"request_price": 0, "second_price": 0, "character_price": 0},
    ],
)
def test_a_version_of_four_prices_stays_where_nothing_else_is_charged(tmp_path: Path, written: dict[str, Any]) -> None:
    assert version(tmp_path, {**TOKENS, **written}) == version(tmp_path, TOKENS) == "a9b0337f"


def test_the_same_price_of_another_unit_is_another_version(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = [
        {"request_price": "0.001"},
        {"image_prices": {"*": "0.001"}},
        {"character_price": 1000},
    ]
    written += [{"second_price": 1}, {"image_prices": {"*/high": "0.001"}}, {"image_prices": {"8x8": "0.001"}}]
    assert len({version(tmp_path, model) for model in written}) == len(written)


# --- GET /v1/models -------------------------------------------------------------------------------------------------


async def listed(config: GatewayConfig) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The entries by id, figures as they are written, and the whole body."""
    client = UpstreamClient()
    try:
        body = await ModelsList(config.models, config.upstreams, client).all()
    finally:
        await client.close()
    return {entry["id"]: entry for entry in json.loads(body, parse_float=Decimal)["data"]}, body


async def test_the_list_shows_every_price_per_unit(tmp_path: Path) -> None:
    async with LocalUpstream(web.get("/v1/models", _lists([]))) as upstream:
        entries, body = await listed(config(tmp_path, {"m": EVERYTHING}, upstream=upstream.base_url))
    assert not re.search(rb"[0-9][eE][-+0-9]", body)
    per_token = {
        "input_token_price": "0.000001",
        "output_token_price": "0.000002",
        "cache_read_token_price": "0.0000001",
        "cache_write_token_price": "0.00000125",
        "audio_input_token_price": "0.00004",
        "image_input_token_price": "0.000005",
        "audio_output_token_price": "0.00008",
        "image_output_token_price": "0.0000325",
        "reasoning_token_price": "0.000003",
    }
    tokens = {name: Decimal(price) for name, price in per_token.items()}
    first = {"input_token_price": Decimal("0.000002"), "reasoning_token_price": Decimal("0.000004")}
    assert entries["m"] == {
        "id": "m",
        "object": "model",
        "created": 0,
        "owned_by": "local",
        **tokens,
        "tiers": [
            {"above_input_tokens": 1000, **tokens, **first},
            {"above_input_tokens": 2000, **tokens, "output_token_price": Decimal("0.000005")},
        ],
        "request_price": Decimal("0.005"),
        "second_price": Decimal("0.0001"),
        "character_price": Decimal("0.000015"),
        "image_prices": {
            "1024x1024": Decimal("0.04"),
            "1024x1024/high": Decimal("0.167"),
            "*/high": Decimal("0.25"),
            "*": 1,
        },
        "context_window": 4096,
        "max_tokens": 512,
    }


async def test_the_list_shows_no_price_that_was_not_set_and_none_of_the_upstreams(tmp_path: Path) -> None:
    theirs = {"input_token_price": 7, "request_price": 7, "image_prices": {"*": 7}, "tiers": [], "pricing": {}}
    said = [{"id": name, "family": "f", **theirs} for name in ("chat", "speech", "free")]
    models: dict[str, dict[str, Any]] = {
        "chat": TOKENS,
        "speech": {"character_price": 15},
        "free": {"request_price": 0},
    }
    async with LocalUpstream(web.get("/v1/models", _lists(said))) as upstream:
        entries, _ = await listed(config(tmp_path, models, upstream=upstream.base_url))
    whose = {"object": "model", "created": 0, "owned_by": "local", "family": "f"}
    assert entries["speech"] == {"id": "speech", **whose, "character_price": Decimal("0.000015")}
    assert entries["free"] == {"id": "free", **whose, "request_price": 0}
    assert entries["chat"] == {
        "id": "chat",
        **whose,
        "input_token_price": Decimal("0.000001"),
        "output_token_price": Decimal("0.000002"),
        "cache_read_token_price": Decimal("0.000001"),
        "cache_write_token_price": Decimal("0.000001"),
        "context_window": 4096,
        "max_tokens": 512,
    }


def _lists(entries: list[dict[str, Any]]) -> Any:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": entries})

    return answer
