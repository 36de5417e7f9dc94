"""GET /v1/models: the upstreams' own lists, cut down to what has a price, with io.net's price fields."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.config.model import Upstream
from gateway.domain.model import Model
from gateway.domain.price import ANY, Prices, TokenPrices, usd_per_unit
from gateway.upstream.client import UpstreamClient, UpstreamError

log = logging.getLogger(__name__)

#: How old an upstream's list may be.
FRESH_S = 60.0
#: How long an upstream may take to send it.
ASK_S = 5.0
_MOST_BYTES = 8 * 2**20


class ModelsList:
    """The priced models. What an upstream says of a model is kept for FRESH_S, and for longer while it is down."""

    def __init__(self, models: Mapping[str, Model], upstreams: Mapping[str, Upstream], client: UpstreamClient) -> None:
        self._models = models
        self._upstreams = upstreams
        self._client = client
        self._said: dict[str, dict[str, dict[str, Any]]] = {}
        self._said_at: dict[str, float] = {}
        self._lock = asyncio.Lock()

    def use(self, models: Mapping[str, Model], upstreams: Mapping[str, Upstream]) -> None:
        """Answer for these from now on."""
        self._models = models
        self._upstreams = upstreams
        self._said_at.clear()

    async def all(self) -> bytes:
        """The body of GET /v1/models."""
        await self._refresh()
        return orjson.dumps({"object": "list", "data": [self._entry(model) for model in self._models.values()]})

    async def one(self, name: str) -> bytes | None:
        """The body of GET /v1/models/NAME; None for a model without a price."""
        if name not in self._models:
            return None
        await self._refresh()
        return orjson.dumps(self._entry(self._models[name]))

    def _entry(self, model: Model) -> dict[str, Any]:
        said = self._said.get(model.upstream, {}).get(model.sent_as or model.name, {})
        known = {
            "id": model.name,
            "object": "model",
            "created": said.get("created", 0),
            "owned_by": said.get("owned_by", model.upstream),
            **_shown_prices(model.prices),
            **({"context_window": model.context_window} if model.context_window else {}),
            **({"max_tokens": model.max_output_tokens} if model.max_output_tokens else {}),
        }
        # An upstream's own price of what is not sold here would look like ours.
        return {**{name: value for name, value in said.items() if not _is_price(name)}, **known}

    async def _refresh(self) -> None:
        # One caller asks; the others wait for its answer rather than ask as well.
        async with self._lock:
            now = time.monotonic()
            old = [name for name in self._upstreams if now - self._said_at.get(name, -FRESH_S) >= FRESH_S]
            await asyncio.gather(*(self._ask(self._upstreams[name]) for name in old))

    async def _ask(self, upstream: Upstream) -> None:
        self._said_at[upstream.name] = time.monotonic()
        try:
            async with asyncio.timeout(ASK_S), self._client.send(upstream, "GET", "/models", {}) as answer:
                document = orjson.loads(await answer.body(_MOST_BYTES)) if answer.status == 200 else None
        except (UpstreamError, TimeoutError, orjson.JSONDecodeError) as error:
            log.warning("upstream %s gives no list of models: %s", upstream.name, error or "no answer in time")
            return
        data = document.get("data") if isinstance(document, dict) else None
        if isinstance(data, list):
            self._said[upstream.name] = {
                entry["id"]: entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)
            }


def _shown_prices(prices: Prices) -> dict[str, Any]:
    """The prices by the configuration's names, in USD per unit as JSON numbers: of what is sold, what was set. What
    cached tokens cost is said wherever tokens are sold."""
    units = {
        "request_price": prices.request_femto,
        "second_price": None if prices.audio_ms_femto is None else prices.audio_ms_femto * 1000,
        "character_price": prices.character_femto,
    }
    shown: dict[str, Any] = {
        **(_shown_tokens(prices.tokens) if prices.tokens else {}),
        **{name: _number(femto) for name, femto in units.items() if femto is not None},
    }
    if prices.images:
        shown["image_prices"] = {_image_name(*kind): _number(femto) for kind, femto in prices.images.items()}
    if prices.tiers:
        shown["tiers"] = [
            {"above_input_tokens": tier.above_input_tokens, **_shown_tokens(tier.tokens)} for tier in prices.tiers
        ]
    return shown


def _is_price(name: str) -> bool:
    return name.endswith(("_price", "_prices")) or name in ("tiers", "pricing")


def _shown_tokens(prices: TokenPrices) -> dict[str, orjson.Fragment]:
    figures = {
        "input": prices.input_femto,
        "output": prices.output_femto,
        "cache_read": prices.cache_read,
        "cache_write": prices.cache_write,
        "audio_input": prices.audio_input_femto,
        "image_input": prices.image_input_femto,
        "audio_output": prices.audio_output_femto,
        "image_output": prices.image_output_femto,
        "reasoning": prices.reasoning_femto,
    }
    return {f"{kind}_token_price": _number(femto) for kind, femto in figures.items() if femto is not None}


def _image_name(size: str, quality: str) -> str:
    """As the key of image_prices is written."""
    return size if quality == ANY else f"{size}/{quality}"


def _number(femto: int) -> orjson.Fragment:
    """USD per unit as a JSON number without exponent, which a float would get."""
    return orjson.Fragment(f"{usd_per_unit(femto):f}")
