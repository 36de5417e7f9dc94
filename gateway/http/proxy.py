"""The metered path: authenticate → quote → reserve → forward → settle.

Whatever happens after the reservation, it ends exactly once: charged with what the upstream says, charged with
what the client was sent before it hung up or its credits ended, or given back whole because the upstream's answer
failed.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import orjson
from aiohttp import web

from gateway.config.model import GatewayConfig
from gateway.credits.errors import StoreError, UnknownPlan
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, RepeatKey, Reservation
from gateway.domain.decision import Denied, Repeated
from gateway.domain.forecast import OutputForecast
from gateway.domain.price import FEMTO_PER_NANO
from gateway.domain.request import InvalidRequest, Operation, affordable_output
from gateway.http import errors
from gateway.http.errors import Failure, funds_headers
from gateway.http.exchange import Exchange, credit_headers
from gateway.http.holding import holding_of, payable_nano
from gateway.http.models import ModelsList
from gateway.http.quote import METERED, PATHS, Quote, forwarded_body, read_body, read_quote, repeat_key
from gateway.http.relay import StreamRelay, write
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.telemetry.metrics import STORE_UNAVAILABLE, Metrics
from gateway.upstream.client import UpstreamAnswer, UpstreamClient, UpstreamError
from gateway.upstream.usage import read_answer

log = logging.getLogger(__name__)

_PREFIXES = ("/v1", "/api/v1")

_MOST_ERROR_BYTES = 2**20
_MOST_RETRY_S = 60


class Proxy:
    """Answers the data listener."""

    def __init__(self, config: GatewayConfig, engine: CreditEngine, client: UpstreamClient, metrics: Metrics) -> None:
        self._config = config
        self._engine = engine
        self._client = client
        self._metrics = metrics
        self._reports = Reports(metrics)
        self._models = ModelsList(config.models, config.upstreams, client)
        self._forecast = OutputForecast()
        self._settling = Settling(engine, self._reports)
        self._relay = StreamRelay(engine, self._settling, self._reports, self._forecast)
        self._active: set[asyncio.Task[object]] = set()

    def use(self, config: GatewayConfig) -> None:
        """Answer new requests by config; those in flight keep the one that they began with."""
        self._config = config
        self._models.use(config.models, config.upstreams)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of the data listener. Never raises but for cancellation."""
        exchange = Exchange(self._config)
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        try:
            response = await self._route(exchange, request)
            exchange.status = response.status
            return response
        except Exception as error:
            if exchange.response is not None and exchange.response.prepared:
                return await self._cut(exchange, request, exchange.response, error)
            return self._excuse(exchange, error)
        finally:
            self._active.discard(task)
            self._reports.finished(exchange)

    async def drain(self, timeout_s: float, hurry: asyncio.Event, settle_s: float) -> None:
        """Let the requests in flight end, for timeout_s or until hurry is set; then cut them, and give what they were
        sent settle_s to be charged."""
        hurried = asyncio.ensure_future(hurry.wait())
        deadline = time.monotonic() + timeout_s
        while self._active and not hurried.done() and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait({*self._active, hurried}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if self._active:
            log.warning("cut %d requests that were still in flight", len(self._active))
            for task in self._active:
                task.cancel()
            await asyncio.wait(self._active, timeout=settle_s)

    def _excuse(self, exchange: Exchange, error: Exception) -> web.StreamResponse:
        """The answer to a request that something went wrong with before any answer had begun."""
        match error:
            case StoreError():
                log.warning("%s: %s", exchange.id, error)
                self._reports.decide(exchange, "denied", STORE_UNAVAILABLE)
                return self._reports.fail(exchange, errors.store_unavailable())
            case UnknownPlan():
                log.error("%s: %s", exchange.id, error)
                return self._reports.fail(exchange, errors.plan_not_configured(error.plan))
            case ConnectionResetError():
                exchange.reason = "client_closed"
                return web.Response(status=exchange.status)  # nobody is there to read it
        log.error("%s failed", exchange.id, exc_info=error)
        return self._reports.fail(exchange, errors.internal_error())

    async def _cut(
        self, exchange: Exchange, request: web.BaseRequest, response: web.StreamResponse, error: Exception
    ) -> web.StreamResponse:
        """End a stream that has begun and cannot go on; a second answer must not be written into it."""
        exchange.status, exchange.reason = response.status, "client_closed"
        if not isinstance(error, ConnectionResetError):
            log.error("%s failed while streaming", exchange.id, exc_info=error)
            exchange.reason = "internal_error"
            with suppress(ConnectionResetError):
                await write(response, errors.internal_error().event(exchange.id))
        if request.transport is not None:
            request.transport.close()
        return response

    async def _route(self, exchange: Exchange, request: web.BaseRequest) -> web.StreamResponse:
        path = next((request.path[len(p) :] for p in _PREFIXES if request.path.startswith(p + "/")), "")
        operation = METERED.get(path)
        if operation is None and path != "/models" and not path.startswith("/models/"):
            return self._reports.fail(exchange, errors.unknown_path(request.method, request.path))
        allowed = "GET" if operation is None else "POST"
        if request.method != allowed:
            return self._reports.fail(exchange, errors.wrong_method(request.method, allowed))
        identity = await self._authenticate(exchange, request)
        if identity is None:
            return self._reports.fail(exchange, errors.bad_key())
        if operation is None:
            return await self._list_models(exchange, path)
        return await self._meter(exchange, request, operation, identity)

    async def _meter(
        self, exchange: Exchange, request: web.BaseRequest, operation: Operation, identity: Identity
    ) -> web.StreamResponse:
        quote = await self._quote(exchange, request, operation)
        if isinstance(quote, Failure):
            return self._reports.fail(exchange, quote)
        repeat = _repeat_of(request, quote, identity)
        if isinstance(repeat, Failure):
            return self._reports.fail(exchange, repeat)
        reservation = await self._reserve(exchange, identity, quote, repeat)
        if isinstance(reservation, web.Response):
            return reservation
        try:
            return await self._forward(exchange, request, quote, reservation)
        finally:
            if not exchange.ended:
                await self._engine.void(reservation)

    # --- authenticate -------------------------------------------------------------------------------------------

    async def _authenticate(self, exchange: Exchange, request: web.BaseRequest) -> Identity | None:
        started = time.perf_counter()
        secret = _secret_of(request.headers)
        exchange.identity = await self._engine.authenticate(secret) if secret else None
        self._reports.spent(exchange, "authenticate", started)
        return exchange.identity

    # --- quote --------------------------------------------------------------------------------------------------

    async def _quote(self, exchange: Exchange, request: web.BaseRequest, operation: Operation) -> Quote | Failure:
        most_bytes = exchange.config.limits.body_bytes
        raw = await read_body(request, most_bytes)
        if isinstance(raw, Failure):
            return raw
        started = time.perf_counter()
        try:
            quote = read_quote(exchange.config, operation, raw)
        except InvalidRequest as error:
            return errors.invalid_body(error)
        exchange.ask = quote.ask if isinstance(quote, Quote) else None
        self._reports.spent(exchange, "quote", started)
        return quote

    # --- reserve ------------------------------------------------------------------------------------------------

    async def _reserve(
        self, exchange: Exchange, identity: Identity, quote: Quote, repeat: RepeatKey | None
    ) -> Reservation | web.Response:
        started = time.perf_counter()
        holding = holding_of(quote, exchange.config.upstreams[quote.model.upstream], self._forecast)
        outcome = await self._engine.reserve(
            identity,
            exchange.number,
            quote.model.name,
            holding.amount_femto,
            holding.minimum_femto,
            LEASE_MS,
            alone_femto=holding.alone_femto,
            grows=holding.grows,
            repeat=repeat,
        )
        self._reports.spent(exchange, "reserve", started)
        if isinstance(outcome, Reservation):
            exchange.reservation, exchange.slice_tokens = outcome, holding.slice_tokens
            self._reports.decide(exchange, "admitted", outcome.reserved.source, outcome.plan.name)
            return outcome
        return self._refuse(exchange, quote, outcome)

    def _refuse(self, exchange: Exchange, quote: Quote, outcome: Denied | Refused | Repeated) -> web.Response:
        match outcome:
            case Refused():
                return self._reports.fail(exchange, errors.bad_key())
            case Repeated():
                failure = errors.repeated(outcome)
                self._reports.decide(exchange, "denied", failure.code)
                return self._reports.fail(exchange, failure)
            case Denied():
                # The account may have come to a plan that was configured after the request began.
                name = outcome.funds.plan
                plan = exchange.config.plans.get(name) or self._config.plans[name]
                failure = errors.denied(outcome, plan, quote.bound, quote.model)
                self._reports.decide(exchange, "denied", failure.code, name)
                return self._reports.fail(exchange, failure, funds_headers(outcome.funds))

    # --- forward ------------------------------------------------------------------------------------------------

    async def _forward(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, reservation: Reservation
    ) -> web.StreamResponse:
        started = time.perf_counter()
        upstream = exchange.config.upstreams[quote.model.upstream]
        payable = reservation.reserved.payg_nano
        if exchange.slice_tokens is not None:  # the hold will grow, as far as there are credits
            payable = max(payable, payable_nano(reservation.reserved.funds, reservation.plan))
        affordable = affordable_output(quote.bound, quote.model, payable * FEMTO_PER_NANO)
        if affordable < quote.bound.output_tokens_each or affordable < (quote.ask.max_tokens or 0):
            exchange.max_tokens = affordable
        quote = replace(quote, bound=replace(quote.bound, output_tokens_each=affordable))
        body = forwarded_body(quote, upstream)
        path = PATHS[quote.ask.operation]
        self._reports.spent(exchange, "forward", started)
        self._metrics.upstream_started(upstream.name)
        try:
            async with self._client.send(upstream, "POST", path, request.headers, body) as answer:
                if answer.status != 200:
                    return await self._pass_error(exchange, answer)
                if quote.ask.stream and answer.content_type == "text/event-stream":
                    return await self._relay.relay(exchange, request, quote, answer)
                return await self._whole(exchange, quote, answer)
        except UpstreamError as error:
            log.warning("%s: upstream %s: %s", exchange.id, upstream.name, error)
            return self._reports.fail(exchange, errors.upstream_failed(error))
        finally:
            self._metrics.upstream_ended(upstream.name)

    async def _pass_error(self, exchange: Exchange, answer: UpstreamAnswer) -> web.Response:
        if answer.status in (401, 402, 403):  # about the operator's key or credits, not the customer's
            log.error("%s: the upstream refuses the gateway's key (status %d)", exchange.id, answer.status)
            return self._reports.fail(exchange, errors.upstream_auth())
        if answer.status < 400:
            return self._reports.fail(exchange, errors.upstream_unavailable())
        body = await answer.body(_MOST_ERROR_BYTES)
        exchange.reason = "upstream_error"
        failure = errors.upstream_error(answer.status, _error_of(body))
        return failure.response(exchange.id, _retry_header(answer))

    async def _whole(self, exchange: Exchange, quote: Quote, answer: UpstreamAnswer) -> web.StreamResponse:
        body = await answer.body(exchange.config.limits.response_bytes)
        read = read_answer(body, quote.ask.operation)
        if read is None:
            log.warning("%s: the upstream's answer is not a JSON object", exchange.id)
            return self._reports.fail(exchange, errors.upstream_unavailable())
        self._reports.watch_overrun(exchange, quote, read.usage)
        await self._settling.charge(exchange, quote.model, read.tokens(quote.ask, quote.bound))
        headers = credit_headers(exchange)
        return web.Response(body=body, headers={**headers, "Content-Type": answer.content_type_header})

    # --- models -------------------------------------------------------------------------------------------------

    async def _list_models(self, exchange: Exchange, path: str) -> web.Response:
        name = path.removeprefix("/models").removeprefix("/")
        body = await self._models.one(name) if name else await self._models.all()
        if body is None:
            return self._reports.fail(exchange, errors.unknown_model(name))
        headers = {"x-request-id": exchange.id, "request-id": exchange.id}
        return web.Response(body=body, content_type="application/json", headers=headers)


def _secret_of(headers: Mapping[str, str]) -> str | None:
    """The customer's secret, in whichever header its client sends it."""
    authorization = headers.get("Authorization", "")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("token") or None


def _repeat_of(request: web.BaseRequest, quote: Quote, identity: Identity) -> RepeatKey | Failure | None:
    key = request.headers.get("Idempotency-Key")
    return None if key is None else repeat_key(quote, identity.account, key)


def _error_of(body: bytes) -> dict[str, object]:
    """The error object in an upstream's answer, empty where there is none with a message."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) and isinstance(error.get("message"), str) else {}


def _retry_header(answer: UpstreamAnswer) -> dict[str, str]:
    """The upstream's Retry-After, cut to a minute: some SDKs sleep however long it says."""
    text = answer.headers.get("Retry-After", "")
    return {"Retry-After": str(min(int(text), _MOST_RETRY_S))} if text.isascii() and text.isdigit() else {}
