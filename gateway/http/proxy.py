"""The metered path: authenticate → quote → reserve → forward → settle.

Whatever happens after the reservation, it ends exactly once: charged with what the upstream says, charged with
what the client was sent before it hung up or its credits ended, or given back whole because the upstream's answer
failed.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from gateway.apis.api import Api, Dialect
from gateway.apis.form import Form
from gateway.apis.free import FREE_APIS, FreeApi
from gateway.apis.registry import APIS
from gateway.config.model import GatewayConfig, Passthrough
from gateway.credits.service import CreditEngine, Identity, Reservation
from gateway.domain.forecast import OutputForecast
from gateway.domain.request import InvalidRequest
from gateway.http import errors
from gateway.http.browser import greeting, let_page_read
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange, request_headers
from gateway.http.excuses import Excuses
from gateway.http.forwarding import Forwarding
from gateway.http.models import ModelsList
from gateway.http.multipart import UploadRoom, read_form
from gateway.http.openapi import PATH as DESCRIPTION_PATH
from gateway.http.openapi import Description
from gateway.http.passthrough import UnreadBody, priced_path, target_of, unread_quote
from gateway.http.quote import (
    Quote,
    body_at_hand,
    invite,
    read_body,
    read_form_quote,
    read_free,
    read_quote,
    repeat_key,
)
from gateway.http.realtime import Realtime
from gateway.http.relay import StreamRelay
from gateway.http.reports import Reports
from gateway.http.reserving import Reserving
from gateway.http.settling import Settling
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient, UpstreamError

log = logging.getLogger(__name__)

_PREFIXES = ("/v1/", "/api/v1/")
_METERED = {prefix.rstrip("/") + path: api for prefix in _PREFIXES for path, api in APIS.items()}


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """What answers a path: for which methods, how, and in whose words it tells errors."""

    methods: Sequence[str]
    serve: Callable[[Exchange, web.BaseRequest, Identity], Awaitable[web.StreamResponse]]
    dialect: Dialect = "openai"


class Proxy:
    """Answers the data listener."""

    def __init__(self, config: GatewayConfig, engine: CreditEngine, client: UpstreamClient, metrics: Metrics) -> None:
        self._config = config
        self._engine = engine
        self._client = client
        self._reports = Reports(metrics)
        self._models = ModelsList(config.models, config.upstreams, client)
        self._description = Description(config)
        _warn_of_unused(config)
        self._excuses = Excuses(self._reports)
        forecast = OutputForecast()
        self._reserving = Reserving(engine, self._reports, forecast, config.plans)
        settling = Settling(engine, self._reports)
        relay = StreamRelay(engine, settling, self._reports, forecast)
        self._realtime = Realtime(engine, metrics, self._reports, settling)
        self._forwarding = Forwarding(client, metrics, self._reports, settling, relay)
        self._active: set[asyncio.Task[object]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._uploads = UploadRoom()

    def use(self, config: GatewayConfig) -> None:
        """Answer new requests by config; those in flight keep the one that they began with."""
        self._config = config
        self._reserving.use(config.plans)
        self._models.use(config.models, config.upstreams)
        self._description = Description(config)
        _warn_of_unused(config)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of the data listener. Never raises but for cancellation."""
        exchange = Exchange(self._config, "Origin" in request.headers)
        task = request.task  # the connection's, or one of the request's own
        self._active.add(task)
        try:
            try:
                response = greeting(request) or await self._route(exchange, request)
                exchange.status = response.status
            except Exception as error:
                response = await self._excuse(exchange, request, error)
            if exchange.from_page:
                let_page_read(exchange, response)
            if self._draining and not response.prepared:
                response.force_close()  # the client's next request is for another gateway
            return response
        finally:
            self._active.discard(task)
            if self._draining and not self._active:
                self._idle.set()
            self._reports.finished(exchange)

    async def _excuse(self, exchange: Exchange, request: web.BaseRequest, error: Exception) -> web.StreamResponse:
        if exchange.response is not None and exchange.response.prepared:
            return await self._excuses.cut(exchange, request, exchange.response, error)
        return self._excuses.excuse(exchange, error)

    async def drain(self, timeout_s: float, hurry: asyncio.Event, settle_s: float) -> None:
        """Let the requests in flight end, for timeout_s or until hurry is set; then cut them, and give what they were
        sent settle_s to be charged."""
        self._draining = True
        self._realtime.close()
        if not self._active:
            return
        ends = [asyncio.ensure_future(event.wait()) for event in (self._idle, hurry)]
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._active:
            log.warning("cut %d requests that were still in flight", len(self._active))
            for task in self._active:
                task.cancel()
            await asyncio.wait(ends[:1], timeout=settle_s)
        for end in ends:
            end.cancel()

    async def _route(self, exchange: Exchange, request: web.BaseRequest) -> web.StreamResponse:
        api = _METERED.get(request.path)
        if api is not None and request.method == "POST":  # as nearly all are: nothing else is looked at
            exchange.dialect = api.dialect
            identity = self._recognize(exchange, request) or await self._authenticate(exchange, request)
            if identity is None:
                return self._reports.fail(exchange, errors.bad_key())
            return await self._meter(api, exchange, request, identity)
        return await self._route_others(exchange, request)

    async def _route_others(self, exchange: Exchange, request: web.BaseRequest) -> web.StreamResponse:
        path = _below_prefix(request.path)
        if path == "/realtime":
            return await self._talk(exchange, request)
        if DESCRIPTION_PATH in (path, request.path):
            return self._describe(exchange, request)
        endpoint = self._endpoint(exchange, request, path)
        if endpoint is None:
            exchange.dialect = "anthropic" if path.startswith("/messages") else "openai"
            return self._reports.fail(exchange, errors.unknown_path(request.method, request.path))
        exchange.dialect = endpoint.dialect
        if request.method not in endpoint.methods:
            return self._reports.fail(exchange, errors.wrong_method(request.method, ", ".join(endpoint.methods)))
        identity = await self._authenticate(exchange, request)
        if identity is None:
            return self._reports.fail(exchange, errors.bad_key())
        return await endpoint.serve(exchange, request, identity)

    def _endpoint(self, exchange: Exchange, request: web.BaseRequest, path: str) -> "_Endpoint | None":
        """What answers a path below ``/v1``."""
        if api := APIS.get(path):  # by another method: it is told which
            return _Endpoint(("POST",), partial(self._meter, api), api.dialect)
        if free := FREE_APIS.get(path):
            return _Endpoint(("POST",), partial(self._pass_free, free), free.dialect)
        if path == "/models" or path.startswith("/models/"):
            name = path.removeprefix("/models").removeprefix("/")
            return _Endpoint(("GET", "HEAD"), partial(self._list_models, name))
        if rule := priced_path(exchange.config, path, request.rel_url.raw_path):
            return _Endpoint(sorted(rule.methods), partial(self._pass_unread, rule))
        return None

    async def _pass_free(
        self, api: FreeApi, exchange: Exchange, request: web.BaseRequest, _: Identity
    ) -> web.StreamResponse:
        raw = await read_body(request, exchange.config.limits.body_bytes)
        if isinstance(raw, Failure):
            return self._reports.fail(exchange, raw)
        try:
            read = read_free(exchange.config, api, raw)
        except InvalidRequest as error:
            return self._reports.fail(exchange, errors.invalid_body(error))
        if isinstance(read, Failure):
            return self._reports.fail(exchange, read)
        self._reports.free(exchange)
        upstream, body = read
        return await self._forwarding.free(exchange, request, upstream, api, body)

    async def _meter(
        self, api: Api, exchange: Exchange, request: web.BaseRequest, identity: Identity
    ) -> web.StreamResponse:
        if api.takes_form:
            form = await read_form(request, exchange.config.limits.upload_bytes, self._uploads)
            if isinstance(form, Failure):
                return self._reports.fail(exchange, form)
            if form is not None:
                with closing(form):
                    return await self._serve_quoted(exchange, request, identity, self._quote(exchange, api, form))
        most_bytes = exchange.config.limits.body_bytes
        raw = body_at_hand(request, most_bytes) or await read_body(request, most_bytes)
        quote = raw if isinstance(raw, Failure) else self._quote(exchange, api, raw)
        return await self._serve_quoted(exchange, request, identity, quote)

    async def _serve_quoted(
        self, exchange: Exchange, request: web.BaseRequest, identity: Identity, quote: Quote | Failure
    ) -> web.StreamResponse:
        if isinstance(quote, Failure):
            return self._reports.fail(exchange, quote)
        key = request.headers.get("Idempotency-Key")
        repeat = None if key is None else repeat_key(quote, identity.account, key)
        if isinstance(repeat, Failure):
            return self._reports.fail(exchange, repeat)
        reservation = await self._reserving.reserve(exchange, identity, quote, repeat)
        if not isinstance(reservation, Reservation):
            return reservation
        try:
            return await self._forwarding.metered(exchange, request, quote, reservation)
        finally:
            if not exchange.ended:
                await self._engine.void(reservation)

    async def _pass_unread(
        self, rule: Passthrough, exchange: Exchange, request: web.BaseRequest, identity: Identity
    ) -> web.StreamResponse:
        most_bytes = exchange.config.limits.upload_bytes
        if failure := await invite(request, most_bytes):
            return self._reports.fail(exchange, failure)
        quote, body = unread_quote(rule), UnreadBody(exchange, request, most_bytes)
        exchange.ask = quote.ask
        reservation = await self._reserving.reserve(exchange, identity, quote, None)
        if not isinstance(reservation, Reservation):
            return reservation
        try:
            return await self._forwarding.unread(exchange, request, quote, target_of(request), body)
        except UpstreamError:
            if not exchange.body_broke:
                raise
            broken = errors.body_too_large(most_bytes) if body.too_large else errors.broken_body("it broke off")
            return self._reports.fail(exchange, broken)
        finally:
            if not exchange.ended:
                await self._engine.void(reservation)

    # --- authenticate -------------------------------------------------------------------------------------------

    def _recognize(self, exchange: Exchange, request: web.BaseRequest) -> Identity | None:
        """Who asks, if that is known without the store, as for nearly all requests."""
        started = time.perf_counter()
        secret = _secret_of(request.headers)
        if not secret or (identity := self._engine.known(secret)) is None:
            return None
        exchange.identity = identity
        self._reports.spent(exchange, "authenticate", started)
        return identity

    async def _authenticate(self, exchange: Exchange, request: web.BaseRequest) -> Identity | None:
        started = time.perf_counter()
        secret = _secret_of(request.headers)
        if secret:
            exchange.identity = await self._engine.authenticate(secret)
        self._reports.spent(exchange, "authenticate", started)
        return exchange.identity

    # --- quote --------------------------------------------------------------------------------------------------

    def _quote(self, exchange: Exchange, api: Api, body: bytes | Form) -> Quote | Failure:
        started = time.perf_counter()
        try:
            if isinstance(body, Form):
                quote = read_form_quote(exchange.config, api, body)
            else:
                quote = read_quote(exchange.config, api, body)
        except InvalidRequest as error:
            return errors.invalid_body(error)
        exchange.ask = quote.ask if isinstance(quote, Quote) else None
        self._reports.spent(exchange, "quote", started)
        return quote

    # --- models -------------------------------------------------------------------------------------------------

    async def _list_models(
        self, name: str, exchange: Exchange, request: web.BaseRequest, _: Identity
    ) -> web.StreamResponse:
        body = await self._models.one(name) if name else await self._models.all()
        if body is None:
            return self._reports.fail(exchange, errors.unknown_model(name))
        return web.Response(body=body, content_type="application/json", headers=request_headers(exchange))

    # --- what looks for a key by itself, or needs none -----------------------------------------------------------

    async def _talk(self, exchange: Exchange, request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "GET":
            return self._reports.fail(exchange, errors.wrong_method(request.method, "GET"))
        return await self._realtime.serve(exchange, request, _secret_of(request.headers))

    def _describe(self, exchange: Exchange, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return self._reports.fail(exchange, errors.wrong_method(request.method, "GET, HEAD"))
        return web.Response(
            body=self._description.body, content_type="application/json", headers=request_headers(exchange)
        )


def _below_prefix(path: str) -> str:
    """What stands behind ``/v1``, or the same; empty for any other path."""
    for prefix in _PREFIXES:
        if path.startswith(prefix):
            return path[len(prefix) - 1 :]
    return ""


def _warn_of_unused(config: GatewayConfig) -> None:
    for pattern in config.passthrough:
        if pattern in APIS or pattern in FREE_APIS or pattern == "/models":
            log.warning("passthrough.%s has no effect: the gateway meters that path itself", pattern)


def _secret_of(headers: Mapping[str, str]) -> str | None:
    """The customer's secret, in whichever header its client sends it."""
    authorization = headers.get("Authorization", "")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("token") or None
