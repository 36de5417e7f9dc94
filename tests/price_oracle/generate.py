"""Writes cases.csv: what a use of each model in the two YAML files costs, worked out with fractions alone.

Nothing of the gateway is imported: this is the other opinion. ``python -m tests.price_oracle.generate`` writes the
file anew, which is only needed when prices or uses are added.
"""

import csv
import io
import math
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FILES = ("per_million.yaml", "per_token.yaml")
COLUMNS = ("model", "rate", "use", "list_nano", "plan_nano", "worked")
#: What the plans of the cases pay of the list price, in turn.
RATES = ("1", "0.9", "0.5", "0.75", "0.333333", "0.01", "1.25")

#: The parts of input and output: the price of each, and the price that it has without one of its own.
PARTS = {
    "cache_read": ("cache_read_token_price", "input_token_price"),
    "cache_write": ("cache_write_token_price", "input_token_price"),
    "audio_input": ("audio_input_token_price", "input_token_price"),
    "image_input": ("image_input_token_price", "input_token_price"),
    "audio_output": ("audio_output_token_price", "output_token_price"),
    "image_output": ("image_output_token_price", "output_token_price"),
    "reasoning": ("reasoning_token_price", "output_token_price"),
}
INPUT_PARTS = ("cache_read", "cache_write", "audio_input", "image_input")
#: Uses of tokens; input and output count their parts.
TOKEN_USES: tuple[dict[str, int], ...] = (
    {"input": 1},
    {"output": 1},
    {"input": 3, "output": 7},
    {"input": 1234, "output": 567, "cache_read": 1024},
    {"input": 100_003, "output": 8191, "cache_read": 77_777, "cache_write": 11_111, "reasoning": 4096},
    {
        "input": 9973,
        "output": 4999,
        "audio_input": 4001,
        "image_input": 1105,
        "audio_output": 2003,
        "image_output": 997,
    },
)
#: Of a model with tiers, beside the others: for each threshold its tokens, and one more or less.
AROUND_A_TIER: tuple[dict[str, int], ...] = (
    {"output": 101, "cache_read": 17, "reasoning": 3},
    {"output": 33, "audio_input": 5, "cache_write": 1009},
)
SECONDS_MS = (1, 999, 1000, 61_001, 3_599_999)
CHARACTERS = (1, 7, 499, 4096, 1_000_003)
REQUESTS = (1, 2, 11)
IMAGES = (("1024x1024", "", 1), ("1024x1024", "hd", 3), ("512x512", "high", 7), ("1792x1024", "low", 10))


def main() -> None:
    (HERE / "cases.csv").write_text(cases())


def cases() -> str:
    """The content of cases.csv."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    number = count()
    for file in FILES:
        # The base loader leaves every figure the text that is written.
        document = yaml.load((HERE / file).read_text(), yaml.BaseLoader)
        tokens_per_price = 1_000_000 if document["price_unit"] == "usd_per_million_tokens" else 1
        for name, model in document["models"].items():
            for use in uses(model):
                rate = RATES[next(number) % len(RATES)]
                usd = cost_usd(model, use, tokens_per_price)
                nano = math.ceil(usd * 10**9), math.ceil(usd * Fraction(rate) * 10**9)
                rows.writerow((name, rate, written(use), *nano, ""))
    return text.getvalue()


def uses(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Uses of what the model sells."""
    found: list[dict[str, Any]] = []
    if "input_token_price" in model:
        found += TOKEN_USES
    for tier in model.get("tiers", ()):
        above = int(tier["above_input_tokens"])
        found += [{"input": above + more, **use} for use in AROUND_A_TIER for more in (-1, 0, 1)]
    if "second_price" in model:
        found += [{"audio_ms": length} for length in SECONDS_MS]
    if "character_price" in model:
        found += [{"characters": characters} for characters in CHARACTERS]
    if "request_price" in model:
        found = [{**use, "requests": 1} for use in found] + [{"requests": requests} for requests in REQUESTS]
    if "image_prices" in model:
        found += [{"images": image} for image in IMAGES if image_price(model["image_prices"], *image[:2]) is not None]
    return found


def cost_usd(model: dict[str, Any], use: dict[str, Any], tokens_per_price: int) -> Fraction:
    """The exact cost of a use."""
    # All tokens of a request are priced by its longest tier, which has the model's own prices where it has none.
    prices = dict(model)
    for tier in model.get("tiers", ()):
        if use.get("input", 0) > int(tier["above_input_tokens"]):
            prices = {**model, **tier}
    usd = Fraction(0)
    plain = {"input": use.get("input", 0), "output": use.get("output", 0)}
    for part, (own, otherwise) in PARTS.items():
        tokens = use.get(part, 0)
        plain["input" if part in INPUT_PARTS else "output"] -= tokens
        usd += tokens * Fraction(prices.get(own, prices.get(otherwise, "0"))) / tokens_per_price
    for side, tokens in plain.items():
        usd += tokens * Fraction(prices.get(f"{side}_token_price", "0")) / tokens_per_price
    usd += use.get("characters", 0) * Fraction(model.get("character_price", "0")) / tokens_per_price
    usd += use.get("audio_ms", 0) * Fraction(model.get("second_price", "0")) / 1000
    usd += use.get("requests", 0) * Fraction(model.get("request_price", "0"))
    if "images" in use:
        size, quality, images = use["images"]
        usd += images * Fraction(image_price(model["image_prices"], size, quality) or "0")
    return usd


def image_price(prices: dict[str, str], size: str, quality: str) -> str | None:
    """The price of the closest kind: a size before a quality."""
    for kind in (f"{size}/{quality}", size, f"*/{quality}", "*"):
        if kind in prices:
            return prices[kind]
    return None


def written(use: dict[str, Any]) -> str:
    """A use as the column has it, such as ``input=3 output=7`` or ``images=1024x1024/hd:3``."""
    words = []
    for kind, amount in use.items():
        if kind == "images":
            size, quality, images = amount
            words.append(f"images={size}{f'/{quality}' if quality else ''}:{images}")
        else:
            words.append(f"{kind}={amount}")
    return " ".join(words)


if __name__ == "__main__":
    main()
