"""GET /v1/models: the upstreams' own lists, cut down to what has a price, with io.net's price fields."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.config.model import Upstream
from gateway.domain.model import Model
from gateway.domain.price import usd_per_token
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
        said = self._said.get(model.upstream, {}).get(model.name, {})
        prices = model.prices
        known: dict[str, Any] = {
            "id": model.name,
            "object": "model",
            "created": said.get("created", 0),
            "owned_by": said.get("owned_by", model.upstream),
            "input_token_price": _number(prices.input_femto),
            "output_token_price": _number(prices.output_femto),
            "cache_read_token_price": _number(prices.cache_read),
            "cache_write_token_price": _number(prices.cache_write),
            "context_window": model.context_window,
            "max_tokens": model.max_output_tokens,
        }
        return {**said, **known}

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


def _number(femto: int) -> orjson.Fragment:
    """USD per token as a JSON number without exponent, which a float would get."""
    return orjson.Fragment(f"{usd_per_token(femto):f}")
