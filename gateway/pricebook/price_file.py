"""A price file in LiteLLM's form (``model_prices_and_context_window.json``): one mapping of model to what it costs."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any

from gateway.config.prices import plain
from gateway.pricebook.offer import INPUT, OUTPUT, Offer, Place, Refused
from gateway.pricebook.upstream_list import UnknownShape

_TOKENS = {
    "input_cost_per_token": INPUT,
    "output_cost_per_token": OUTPUT,
    "cache_read_input_token_cost": "cache_read_token_price",
    "cache_creation_input_token_cost": "cache_write_token_price",
    "input_cost_per_audio_token": "audio_input_token_price",
    "input_cost_per_image_token": "image_input_token_price",
    "output_cost_per_audio_token": "audio_output_token_price",
    "output_cost_per_image_token": "image_output_token_price",
    "output_cost_per_reasoning_token": "reasoning_token_price",
}
#: Prices of other ways to be served, which the gateway's requests do not take.
_OTHER_SERVICE = re.compile(r".*_(batch|batches|flex|priority|ultrafast)")
_TIER = re.compile(r"(.+)_above_([0-9]{1,5})k_tokens")
_IMAGE = re.compile(r"(?:(.+)/)?([0-9]{1,5})-x-([0-9]{1,5})/(.+)")
_QUALITIES = frozenset("standard hd low medium high auto".split())
#: What makes one image, and what transcribes: only there are such prices what the gateway means by them.
_MAKES_IMAGES = ("image_generation", "image_edit")
_BY_SECOND = ("audio_transcription",)
_BY_CHARACTER = ("audio_speech",)
_BY_QUERY = ("rerank", "embedding")
_NO_OUTPUT = ("embedding", "rerank", "moderation")
#: Keys of the file that are no models.
_NO_MODELS = ("sample_spec", "fallback_generalizations")

Entry = Mapping[str, Any]


def read_price_file(document: object) -> dict[str, Offer | Refused]:
    """What the file says of each model. Raises UnknownShape."""
    if not isinstance(document, dict):
        raise UnknownShape("is no price file: a JSON object of models was expected")
    entries = {name: entry for name, entry in document.items() if isinstance(entry, dict) and name not in _NO_MODELS}
    if not any(_is_price(field) for entry in entries.values() for field in entry):
        raise UnknownShape("has no price: fields such as input_cost_per_token in a mapping per model were expected")
    offers: dict[str, Offer | Refused] = {}
    for name, entry in entries.items():
        image = _IMAGE.fullmatch(name)
        if image is None:
            _merge(offers, name, partial(_offer, entry))
        else:
            model, kind = _image_name(image)
            _merge(offers, model, partial(_image_offer, entry, kind, int(image[2]) * int(image[3])))
    return offers


def _merge(offers: dict[str, Offer | Refused], name: str, read: Callable[[], Offer]) -> None:
    """A model that makes images has an entry of its own and one for every size."""
    known = offers.get(name)
    try:
        offer = read()
    except Refused as error:
        offers[name] = error
        return
    if isinstance(known, Offer):
        figures, notes = {**known.figures, **offer.figures}, dict.fromkeys((*known.notes, *offer.notes))
        offer = Offer(figures, tuple(notes), known.window_at_least or offer.window_at_least, offer.no_output)
    if not isinstance(known, Refused):
        offers[name] = offer


def _image_name(match: re.Match[str]) -> tuple[str, str]:
    """The model and the kind of image in a name such as ``azure/hd/1024-x-1792/dall-e-3``."""
    before, width, height, model = match.groups()
    parts = before.split("/") if before else []
    quality = parts.pop() if parts and parts[-1] in _QUALITIES else ""
    size = f"{int(width)}x{int(height)}"
    return "/".join([*parts, model]), f"{size}/{quality}" if quality else size


def _image_offer(entry: Entry, kind: str, pixels: int) -> Offer:
    price, field = _image_price(entry)
    if price is None:
        per_pixel = _figure(entry, "output_cost_per_pixel") or _figure(entry, "input_cost_per_pixel")
        price = per_pixel * pixels if per_pixel else None
    figures: dict[Place, Decimal] = {} if price is None else {("image_prices", kind): price}
    known = {field, "input_cost_per_pixel", "output_cost_per_pixel"}
    return Offer(figures, tuple(f"{note} ({kind})" for note in _notes(entry, known)))


def _image_price(entry: Entry) -> tuple[Decimal | None, str]:
    """The price of one image and the field that says it: older entries call what is made input."""
    for field in ("output_cost_per_image", "input_cost_per_image"):
        if price := _figure(entry, field):
            return price, field
    return None, ""


def _offer(entry: Entry) -> Offer:
    entry = _without_ranges(entry)
    figures: dict[Place, Decimal] = {}
    used = set()
    for field in entry:
        tier = _TIER.fullmatch(field)
        name = _TOKENS.get(tier[1] if tier else field)
        if name and (figure := _figure(entry, field)) is not None:
            figures[("tiers", int(tier[2]) * 1000, name) if tier else (name,)] = figure
            used.add(field)
    cached = _figure(entry, "input_cost_per_token_cache_hit")  # an older name of the same price
    if cached is not None and figures.setdefault(("cache_read_token_price",), cached) == cached:
        used.add("input_cost_per_token_cache_hit")
    counted = _counted(entry)
    figures |= {place: figure for place, (figure, _) in counted.items()}
    used |= {field for _, field in counted.values()}
    if figures.get(("second_price",)) == _figure(entry, "input_cost_per_second"):
        used.add("input_cost_per_second")  # the same price once more
    return Offer(
        figures | _sizes(entry),
        _notes(entry, used),
        window_at_least=True,
        no_output=entry.get("mode") in _NO_OUTPUT,
    )


def _counted(entry: Entry) -> dict[Place, tuple[Decimal, str]]:
    """Prices of what is not tokens, each with the field that says it."""
    mode = entry.get("mode")
    found: dict[Place, tuple[Decimal, str]] = {}

    def take(place: Place, modes: tuple[str, ...] | None, *fields: str) -> None:
        for field in fields:
            if (modes is None or mode in modes) and (figure := _figure(entry, field)):
                found.setdefault(place, (figure, field))

    take(("request_price",), None, "input_cost_per_request")
    take(("request_price",), _BY_QUERY, "input_cost_per_query")
    take(("second_price",), _BY_SECOND, "output_cost_per_second", "input_cost_per_second")
    take(("character_price",), _BY_CHARACTER, "input_cost_per_character")
    take(("image_prices", "*"), _MAKES_IMAGES, "output_cost_per_image", "input_cost_per_image")
    return found


def _without_ranges(entry: Entry) -> Entry:
    """``tiered_pricing``, a list of ranges of input each with its prices, in the form of the other fields."""
    ranges = entry.get("tiered_pricing")
    if not isinstance(ranges, list):
        return entry
    flat = {field: value for field, value in entry.items() if field != "tiered_pricing"}
    for part in ranges:
        bounds = part.get("range") if isinstance(part, dict) else None
        if not isinstance(bounds, list) or not bounds or not isinstance(bounds[0], int | Decimal) or bounds[0] % 1000:
            return entry  # named as what was not imported
        suffix = f"_above_{int(bounds[0]) // 1000}k_tokens" if bounds[0] else ""
        flat |= {f"{field}{suffix}": value for field, value in part.items() if field != "range"}
    return flat


def _sizes(entry: Entry) -> dict[Place, Decimal]:
    longest, most = _figure(entry, "max_input_tokens"), _figure(entry, "max_output_tokens")
    most = _figure(entry, "max_tokens") if most is None else most
    sizes: dict[Place, Decimal] = {}
    if longest:
        # It names the longest input; the window has room for the longest answer too.
        sizes["context_window",] = max(longest, most or longest)
    if most and entry.get("mode") not in _NO_OUTPUT:
        sizes["max_output_tokens",] = most
    return sizes


def _figure(entry: Entry, field: str) -> Decimal | None:
    value = entry.get(field)
    if value is None:
        return None
    if type(value) is int or isinstance(value, Decimal):
        return Decimal(value)
    raise Refused(f"{field} is not a number")


def _is_price(field: str) -> bool:
    return "cost" in field or "pric" in field


def _notes(entry: Entry, used: set[str]) -> tuple[str, ...]:
    """The prices that were not used, but for those of other services and those of 0."""
    return tuple(
        f"{field} {_shown(value)}"
        for field, value in entry.items()
        if _is_price(field) and field not in used and value and not _OTHER_SERVICE.fullmatch(field)
    )


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "(several figures)"
    return plain(Decimal(value)) if type(value) is int or isinstance(value, Decimal) else repr(value)[:60]
