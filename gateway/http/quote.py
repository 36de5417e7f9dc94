"""From the bytes of a request to what it may cost, and to the bytes that are forwarded."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import orjson
from aiohttp import web
from aiohttp.web_exceptions import HTTPException

from gateway.config.model import GatewayConfig, Upstream
from gateway.domain.model import Model
from gateway.domain.request import Ask, Bound, InvalidRequest, Operation, bound_of, read_request
from gateway.http import errors
from gateway.http.errors import Failure

METERED: Mapping[str, Operation] = {
    "/chat/completions": "chat",
    "/completions": "text_completion",
    "/embeddings": "embeddings",
}
PATHS = {operation: path for path, operation in METERED.items()}
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
# What a body may hold at most: parsing takes seconds and gigabytes where megabytes of it are brackets.
_MOST_CONTAINERS = 200_000
_MOST_VALUES = 2_000_000
_BODY_S = 300.0


@dataclass(frozen=True, slots=True)
class Quote:
    """A request that may be reserved for: what it asks, of which model, and its bound. body: what will be forwarded,
    but for its limit and stream_options, which come before it."""

    ask: Ask
    model: Model
    bound: Bound
    stream_options: dict[str, object]
    body: bytes


async def read_body(request: web.BaseRequest, most_bytes: int) -> bytes | Failure:
    """The request's whole body, decompressed, or why it is not taken."""
    if (request.content_length or 0) > most_bytes:
        return errors.body_too_large(most_bytes)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > most_bytes:
                    return errors.body_too_large(most_bytes)
                parts.append(chunk)
    except TimeoutError:
        return errors.body_too_slow()
    except (web.RequestPayloadError, HTTPException) as error:
        return errors.broken_body(str(error))
    return b"".join(parts)


def read_quote(config: GatewayConfig, operation: Operation, raw: bytes) -> Quote | Failure:
    """What is priced is what is forwarded: the document is written anew, so that duplicate keys and odd encodings
    mean the same on both sides, and the length of what is forwarded bounds the tokens of its text.

    Raises InvalidRequest."""
    if raw.count(b"{") + raw.count(b"[") > _MOST_CONTAINERS or raw.count(b",") > _MOST_VALUES:
        raise InvalidRequest("it has too many values")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"it is not JSON: {error}") from error
    model = _model_of(config, body)
    allowed = config.upstreams[model.upstream].allow_fields if model else ()
    try:
        ask = read_request(operation, body, 0, allowed)
        if model is None:
            return errors.unknown_model(ask.model)
        assert isinstance(body, dict)  # read_request refuses anything else
        options = body.pop("stream_options", None) or {}
        for name in LIMIT_FIELDS:
            body.pop(name, None)
        forwarded = orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("it is nested too deeply") from error
    ask = ask.of_size(len(forwarded))
    return Quote(ask, model, bound_of(ask, model), options, forwarded)


def _model_of(config: GatewayConfig, body: object) -> Model | None:
    name = body.get("model") if isinstance(body, dict) else None
    return config.models.get(name) if isinstance(name, str) else None


def forwarded_body(quote: Quote, upstream: Upstream) -> bytes:
    """The body for the upstream: what was priced, its output limited to what is held, its usage asked for."""
    first: dict[str, object] = {}
    if quote.bound.answers:
        first[upstream.limit_field] = quote.bound.output_tokens_each
    options = quote.stream_options
    if quote.ask.stream and upstream.stream_usage:
        options = {**options, "include_usage": True}
    if options:
        first["stream_options"] = options
    return orjson.dumps(first)[:-1] + b"," + quote.body[1:] if first else quote.body
