"""From the bytes of a request to what it may cost, and to the bytes that are forwarded."""

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web
from aiohttp.web_exceptions import HTTPException

from gateway.apis.api import Api
from gateway.apis.form import Form
from gateway.apis.free import FreeApi
from gateway.config.model import GatewayConfig, Upstream
from gateway.credits.service import RepeatKey
from gateway.domain.model import Model
from gateway.domain.request import Ask, Bound, InvalidRequest, bound_of, worst_parts
from gateway.domain.value import value
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.upstream.connection import Pieces, merged

# What a body may hold at most: parsing takes seconds and gigabytes where megabytes of it are brackets.
_MOST_CONTAINERS = 200_000
_MOST_VALUES = 2_000_000
_MOST_KEYS = 1_000_000
_NESTED = (dict, list)
_BODY_S = 300.0
_ENCODINGS = ("", "identity", "gzip", "deflate")
_KEY = re.compile(r"[!-~]{1,255}")
_HASH_DIGITS = 24


@value(frozen=True, slots=True)
class Quote:
    """A request that may be reserved for: what it asks, of which model, and its bound. worst: what that can cost, as
    ``worst_parts`` tells. body: what will be forwarded, but for the fields that the gateway writes anew, which come
    before it; taken: what the client wrote in them. form: what came instead of JSON. alternatives: the same of other
    models, which answer where this one's upstream fails.
    """

    api: Api
    ask: Ask
    model: Model
    bound: Bound
    worst: tuple[int, int]
    taken: Mapping[str, Any]
    body: bytes
    form: Form | None = None
    alternatives: tuple["Quote", ...] = ()

    @property
    def most_femto(self) -> int:
        """The most that it can cost, in femto-credits at list price."""
        fixed, token = self.worst
        return fixed + self.bound.output_tokens_each * token


async def invite(request: web.BaseRequest, most_bytes: int) -> Failure | None:
    """Let a client that waits for it send its body, unless it says that it is too large, or packed in a way that is not
    read here."""
    encoding = ", ".join(request.headers.getall("Content-Encoding", ())).lower()
    if encoding not in _ENCODINGS:  # nothing was unpacked: its bytes would be taken for the text itself
        return errors.unknown_encoding(encoding)
    if (request.content_length or 0) > most_bytes:
        return errors.body_too_large(most_bytes)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


def body_at_hand(request: web.BaseRequest, most_bytes: int) -> bytes | Failure | None:
    """What ``read_body`` gives, where the body has come already and is not packed, as most are; else None."""
    content = request.content
    if "Content-Encoding" in request.headers or not content.is_eof() or content.exception() is not None:
        return None
    raw = content.read_nowait()
    return raw if len(raw) <= most_bytes else errors.body_too_large(most_bytes)


async def read_body(request: web.BaseRequest, most_bytes: int) -> bytes | Failure:
    """The request's whole body, decompressed, or why it is not taken."""
    if failure := await invite(request, most_bytes):
        return failure
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
    except (web.RequestPayloadError, HTTPException):
        return errors.broken_body("it broke off, or is not what its Content-Encoding says")
    return b"".join(parts)


def _read_json(raw: bytes) -> object:
    """A body, decoded. Raises InvalidRequest."""
    # Each value takes three bytes, but where they are nested, which the library takes 1,024 times: so most bodies need
    # not be searched, which takes 1.1 ms for 400 kB.
    if len(raw) > 3 * _MOST_CONTAINERS and _has_too_much(raw):
        raise InvalidRequest("it has too many values")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"it is not JSON: {error}") from error


def _has_too_much(raw: bytes) -> bool:
    containers = raw.count(b"{") + raw.count(b"[")
    return containers > _MOST_CONTAINERS or raw.count(b",") > _MOST_VALUES or raw.count(b'":') > _MOST_KEYS


def read_quote(config: GatewayConfig, api: Api, raw: bytes) -> Quote | Failure:
    """What is priced is what is forwarded: the document is written anew, so that duplicate keys and odd encodings
    mean the same on both sides, and the length of what is forwarded bounds the tokens of its text.

    Raises InvalidRequest."""
    return _read_quote(config, api, _read_json(raw), None)


def read_form_quote(config: GatewayConfig, api: Api, form: Form) -> Quote | Failure:
    """The same of a form. Raises InvalidRequest."""
    return _read_quote(config, api, form.document(api.typed_fields), form)


def _read_quote(config: GatewayConfig, api: Api, body: object, form: Form | None) -> Quote | Failure:
    name = body.get("model") if isinstance(body, dict) else None
    model = config.models.get(name) if isinstance(name, str) else None
    if model is None:
        return errors.unknown_model(api.read(body).model)
    assert isinstance(body, dict)  # what is none names no model
    try:
        first = _read_one(config, api, body, model, form)
        if model.fallbacks:
            return replace(first, alternatives=tuple(_alternatives(config, api, body, model, form)))
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("it is nested too deeply") from error
    return first


def _alternatives(
    config: GatewayConfig, api: Api, body: dict[str, Any], model: Model, form: Form | None
) -> Iterator[Quote]:
    for name in model.fallbacks:
        with suppress(InvalidRequest):  # what another model does not sell, it does not answer
            yield _read_one(config, api, body, config.models[name], form)


def _read_one(config: GatewayConfig, api: Api, body: dict[str, Any], model: Model, form: Form | None) -> Quote:
    ask = api.read(body, config.upstreams[model.upstream].allow_fields)
    api.check_sold(ask, model)
    if form is not None:
        return quote_of(api, ask, model, {}, b"", form)
    taken: dict[str, Any] = {}
    kept = body.copy()
    for name in api.set_fields:
        if name in kept:
            taken[name] = wanted = kept.pop(name)
            if type(wanted) in _NESTED:
                orjson.dumps(taken)  # it is written later, when it is too late to refuse it
    kept["model"] = model.sent_as or model.name
    forwarded = orjson.dumps(kept)
    return quote_of(api, ask.of_size(len(forwarded)), model, taken, forwarded)


def quote_of(
    api: Api, ask: Ask, model: Model, taken: Mapping[str, Any], body: bytes, form: Form | None = None
) -> Quote:
    """A quote for what is asked of model."""
    bound = bound_of(ask, model)
    return Quote(api, ask, model, bound, worst_parts(bound, model), taken, body, form)


def read_free(config: GatewayConfig, api: FreeApi, raw: bytes) -> tuple[Upstream, bytes] | Failure:
    """Where a request that costs nothing goes, and its body there. Raises InvalidRequest."""
    body = _read_json(raw)
    name = api.model_of(body)
    model = config.models.get(name)
    if model is None:
        return errors.unknown_model(name)
    assert isinstance(body, dict)  # model_of refuses anything else
    try:
        # Written anew, so that a second "model" in it means the same on both sides.
        return config.upstreams[model.upstream], orjson.dumps(_renamed(body, model))
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("it is nested too deeply") from error


def _renamed(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """The body with the model as its upstream calls it, which may be another than the one that was asked for."""
    name = model.sent_as or (model.name if "model" in body else None)
    return body if body.get("model") == name else {**body, "model": name}


def repeat_key(quote: Quote, account: str, key: str) -> RepeatKey | Failure:
    """What tells the store whether a request came before. key: the client's Idempotency-Key header."""
    if not _KEY.fullmatch(key):
        return errors.invalid_idempotency_key()
    # As the client wrote it: what the gateway sets, by the credits of the moment, is no part of what was asked.
    asked = orjson.dumps([quote.api.name, quote.taken])
    content = quote.body if quote.form is None else quote.form.digest.encode()
    return RepeatKey(key_hash=_hash(f"{account}\n{key}".encode()), body_hash=_hash(asked + content))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]


def forwarded_body(quote: Quote, upstream: Upstream) -> bytes | Pieces:
    """The body for the upstream: what was priced, its output limited to what is held, its usage asked for."""
    first = quote.api.written_anew(quote.ask, quote.bound, quote.taken, upstream)
    if not first:
        return quote.body
    return merged(orjson.dumps(first), quote.body)
