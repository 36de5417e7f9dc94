"""The answer of an upstream's ``GET /models``, in three shapes. Each has its unit, and none is read as another.

- per token: numbers beside the model's id, named as in models.yaml, in USD per token (io.net, and this gateway).
- per million: ``metadata`` with the same names as strings, in USD per million tokens (io.net's OpenAPI).
- OpenRouter's: ``pricing`` with strings in USD per token, where "0" stands for no price of its own.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from gateway.config.prices import plain
from gateway.config.raw import TOKEN_PRICES
from gateway.pricebook.offer import INPUT, OUTPUT, Offer, Place, Refused

_COUNTED = ("request_price", "second_price", "character_price")
_OPENROUTER = {
    "prompt": INPUT,
    "completion": OUTPUT,
    "input_cache_read": "cache_read_token_price",
    "input_cache_write": "cache_write_token_price",
    "audio": "audio_input_token_price",
    "audio_output": "audio_output_token_price",
    "internal_reasoning": "reasoning_token_price",
    "request": "request_price",
}
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,18})?([eE][-+]?[0-9]{1,2})?")

Entry = Mapping[str, Any]


class UnknownShape(Exception):
    """The answer is no list of models with prices; the message says what is missing."""


def read_list(document: object) -> dict[str, Offer | Refused]:
    """What the list says of each model that it has a price for. Raises UnknownShape."""
    data = document.get("data") if isinstance(document, dict) else document
    if not isinstance(data, list):
        raise UnknownShape('is no list of models: a JSON object with "data": [...] was expected')
    entries = [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    offers = {entry["id"]: offer for entry in entries if (offer := _offer(entry)) is not None}
    if not offers:
        raise UnknownShape(
            f"has {len(entries)} models and no price in a known place: known are input_token_price beside the id (USD "
            "per token), in metadata (text, USD per million tokens), and pricing.prompt (text, USD per token)"
        )
    return offers


def _offer(entry: Entry) -> Offer | Refused | None:
    """What one entry says; None where it has no price."""
    shapes: tuple[Callable[[Entry], Offer | None], ...] = (_per_token, _per_million, _openrouter)
    try:
        found = [offer for read in shapes if (offer := read(entry)) is not None]
    except Refused as error:
        return error
    first = found[0] if found else None
    for other in found[1:]:
        for place in (INPUT,), (OUTPUT,):
            if found[0].figures.get(place) != other.figures.get(place):
                return Refused(f"says two different {place[0]}s in two places")
    return first


def _per_token(entry: Entry) -> Offer | None:
    figures: dict[Place, Decimal] = {}
    for field in (*TOKEN_PRICES, *_COUNTED):
        if entry.get(field) is not None:
            figures[field,] = _as_number(entry[field], field)
    for kind, price in _mapping(entry.get("image_prices")).items():
        figures["image_prices", kind] = _as_number(price, f"image_prices {kind}")
    tiers = entry.get("tiers")
    for tier in tiers if isinstance(tiers, list) else ():
        figures |= _tier(_mapping(tier))
    if not figures:
        return None
    return Offer(figures | _sizes(entry, "context_window", "max_tokens"))


def _tier(tier: Entry) -> dict[Place, Decimal]:
    above = tier.get("above_input_tokens")
    if type(above) is not int:
        raise Refused("has a tier without above_input_tokens")
    return {
        ("tiers", above, field): _as_number(tier[field], field) for field in TOKEN_PRICES if tier.get(field) is not None
    }


def _per_million(entry: Entry) -> Offer | None:
    metadata = _mapping(entry.get("metadata"))
    figures: dict[Place, Decimal] = {
        (field,): _as_text(metadata[field], f"metadata.{field}").scaleb(-6)
        for field in TOKEN_PRICES
        if metadata.get(field) is not None
    }
    if not figures:
        return None
    return Offer(figures | _sizes({**entry, **metadata}, "context_window", "max_tokens"))


def _openrouter(entry: Entry) -> Offer | None:
    pricing = _mapping(entry.get("pricing"))
    if not {"prompt", "completion"} <= pricing.keys():
        return None
    figures: dict[Place, Decimal] = {}
    notes = []
    for field, price in pricing.items():
        known = _OPENROUTER.get(field)
        if price is None:
            continue
        if known is None:
            if _is_something(price):
                notes.append(f"pricing.{field} {_shown(price)}")
            continue
        if price == "-1":
            raise Refused(f"has no fixed price (pricing.{field} is -1)")
        figure = _as_text(price, f"pricing.{field}")
        if figure or known in (INPUT, OUTPUT):
            figures[known,] = figure
    top = _mapping(entry.get("top_provider"))
    sizes = _sizes({**entry, "max": top.get("max_completion_tokens")}, "context_length", "max")
    return Offer(figures | sizes, tuple(notes))


def _sizes(entry: Entry, window_name: str, most_name: str) -> dict[Place, Decimal]:
    """The sizes that are said. No answer is longer than the window, whatever the list says of it."""
    window, most = (_size(entry.get(name), name) for name in (window_name, most_name))
    if window and most:
        most = min(window, most)
    sizes: dict[Place, Decimal | None] = {("context_window",): window, ("max_output_tokens",): most}
    return {place: size for place, size in sizes.items() if size}


def _size(value: object, name: str) -> Decimal | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return Decimal(value[:20])
    if value is None or type(value) is int or isinstance(value, Decimal):
        return None if value is None else Decimal(value)
    raise Refused(f"{name} is no number")


def _as_number(value: object, field: str) -> Decimal:
    if type(value) is int or isinstance(value, Decimal):
        return Decimal(value)
    raise Refused(
        f"{field} is {_shown(value)}, where a number in USD per token was expected: in which unit it is cannot be told"
    )


def _as_text(value: object, field: str) -> Decimal:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return Decimal(value)
    raise Refused(f"{field} is {_shown(value)}, where a number in quotes was expected: its unit cannot be told")


def _mapping(value: object) -> Entry:
    return value if isinstance(value, dict) else {}


def _is_something(price: object) -> bool:
    if isinstance(price, str) and _NUMBER.fullmatch(price):
        return bool(Decimal(price))
    return bool(price)


def _shown(value: object) -> str:
    if isinstance(value, Decimal):
        return plain(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
