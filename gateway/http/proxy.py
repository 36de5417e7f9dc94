"""The metered path: authenticate → quote → reserve → forward → settle.

Whatever happens after the reservation, it ends exactly once: charged with what the upstream says, charged with
what the client was sent before it hung up, or given back whole because the upstream's answer failed.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
from aiohttp import web
from aiohttp.web_exceptions import HTTPException

from gateway.config.model import GatewayConfig
from gateway.credits.errors import StoreError, UnknownPlan
from gateway.credits.service import CreditEngine, Identity, Refused, Reservation
from gateway.domain.decision import Denied, Settlement
from gateway.domain.model import Model
from gateway.domain.money import format_credits
from gateway.domain.price import FEMTO_PER_NANO, Tokens
from gateway.domain.request import (
    Ask,
    Bound,
    InvalidRequest,
    Operation,
    affordable_output,
    bound_of,
    least_output,
    read_request,
    worst_femto,
)
from gateway.http import errors
from gateway.http.errors import Failure, funds_headers, rfc3339
from gateway.http.models import ModelsList
from gateway.telemetry.logs import log_request
from gateway.telemetry.metrics import STORE_UNAVAILABLE, Metrics, Phase
from gateway.upstream.client import UpstreamAnswer, UpstreamClient, UpstreamError, UpstreamTimeout
from gateway.upstream.sse import BrokenStream, EventStream
from gateway.upstream.usage import billed, billed_without_usage, read_answer

log = logging.getLogger(__name__)

METERED: Mapping[str, Operation] = {
    "/chat/completions": "chat",
    "/completions": "text_completion",
    "/embeddings": "embeddings",
}
_PREFIXES = ("/v1", "/api/v1")

#: A reservation outlives the longest answer by this much, so that no live request loses its hold.
LEASE_MARGIN_MS = 60_000
_MOST_ERROR_BYTES = 2**20
_CLIENT_STALL_S = 60.0


@dataclass(slots=True)
class Exchange:
    """One request as it goes through, for its answer's headers, its log line and its metrics."""

    number: str = field(default_factory=lambda: secrets.token_hex(12))
    started: float = field(default_factory=time.perf_counter)
    identity: Identity | None = None
    ask: Ask | None = None
    reservation: Reservation | None = None
    ended: bool = False
    settlement: Settlement | None = None
    tokens: Tokens = field(default_factory=lambda: Tokens(0, 0))
    max_tokens: int | None = None
    decision: str = "none"
    reason: str | None = None
    status: int = 499
    overhead_s: float = 0.0
    first_byte: float | None = None

    @property
    def id(self) -> str:
        """What x-request-id says."""
        return f"req_{self.number}"


@dataclass(frozen=True, slots=True)
class Quote:
    """A request that may be reserved for: what it asks, of which model, its bound and its decoded body."""

    ask: Ask
    model: Model
    bound: Bound
    body: dict[str, object]


class Proxy:
    """Answers the data listener."""

    def __init__(self, config: GatewayConfig, engine: CreditEngine, client: UpstreamClient, metrics: Metrics) -> None:
        self._config = config
        self._engine = engine
        self._client = client
        self._metrics = metrics
        self._models = ModelsList(config.models, config.upstreams, client)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of the data listener. Never raises but for cancellation."""
        exchange = Exchange()
        try:
            response = await self._route(exchange, request)
            exchange.status = response.status
            return response
        except StoreError as error:
            log.warning("%s: %s", exchange.id, error)
            self._decide(exchange, "denied", STORE_UNAVAILABLE)
            return self._fail(exchange, errors.store_unavailable())
        except UnknownPlan as error:
            log.error("%s: %s", exchange.id, error)
            return self._fail(exchange, errors.plan_not_configured(str(error)))
        except ConnectionResetError:
            exchange.reason = "client_closed"
            return web.Response(status=exchange.status)  # nobody is there to read it
        except Exception:
            log.exception("%s failed", exchange.id)
            return self._fail(exchange, errors.internal_error())
        finally:
            self._report(exchange)

    async def _route(self, exchange: Exchange, request: web.BaseRequest) -> web.StreamResponse:
        path = next((request.path[len(p) :] for p in _PREFIXES if request.path.startswith(p + "/")), "")
        operation = METERED.get(path)
        if operation is None and path != "/models" and not path.startswith("/models/"):
            return self._fail(exchange, errors.unknown_path(request.method, request.path))
        allowed = "GET" if operation is None else "POST"
        if request.method != allowed:
            return self._fail(exchange, errors.wrong_method(request.method, allowed))
        identity = await self._authenticate(exchange, request)
        if identity is None:
            return self._fail(exchange, errors.bad_key())
        if operation is None:
            return await self._list_models(exchange, path)
        return await self._meter(exchange, request, operation, identity)

    async def _meter(
        self, exchange: Exchange, request: web.BaseRequest, operation: Operation, identity: Identity
    ) -> web.StreamResponse:
        quote = await self._quote(exchange, request, operation)
        if isinstance(quote, Failure):
            return self._fail(exchange, quote)
        reservation = await self._reserve(exchange, identity, quote)
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
        self._spent(exchange, "authenticate", started)
        return exchange.identity

    # --- quote --------------------------------------------------------------------------------------------------

    async def _quote(self, exchange: Exchange, request: web.BaseRequest, operation: Operation) -> Quote | Failure:
        most_bytes = self._config.limits.body_bytes
        raw = await _read_body(request, most_bytes)
        if isinstance(raw, Failure):
            return raw
        started = time.perf_counter()
        try:
            body = orjson.loads(raw)
            # What is priced is what is forwarded: this document, written anew, so that duplicate keys and odd
            # encodings mean the same on both sides. The bytes it came in bound the tokens of its text.
            model = self._model_of(body)
            allowed = self._config.upstreams[model.upstream].allow_fields if model else ()
            ask = read_request(operation, body, len(raw), allowed)
        except orjson.JSONDecodeError as error:
            return errors.invalid_body(InvalidRequest(f"it is not JSON: {error}"))
        except InvalidRequest as error:
            return errors.invalid_body(error)
        exchange.ask = ask
        self._spent(exchange, "quote", started)
        if model is None:
            return errors.unknown_model(ask.model)
        return Quote(ask, model, bound_of(ask, model), body)

    def _model_of(self, body: object) -> Model | None:
        name = body.get("model") if isinstance(body, dict) else None
        return self._config.models.get(name) if isinstance(name, str) else None

    # --- reserve ------------------------------------------------------------------------------------------------

    async def _reserve(self, exchange: Exchange, identity: Identity, quote: Quote) -> Reservation | web.Response:
        started = time.perf_counter()
        bound, model = quote.bound, quote.model
        upstream = self._config.upstreams[model.upstream]
        outcome = await self._engine.reserve(
            identity,
            exchange.number,
            model.name,
            worst_femto(bound, model, bound.output_tokens_each),
            worst_femto(bound, model, least_output(bound)),
            upstream.total_timeout_ms + LEASE_MARGIN_MS,
        )
        self._spent(exchange, "reserve", started)
        if isinstance(outcome, Refused):
            return self._fail(exchange, errors.bad_key())
        if isinstance(outcome, Denied):
            failure = errors.denied(outcome, self._config.plans[outcome.funds.plan], bound, model)
            self._decide(exchange, "denied", failure.code, outcome.funds.plan)
            return self._fail(exchange, failure, funds_headers(outcome.funds))
        exchange.reservation = outcome
        self._decide(exchange, "admitted", outcome.reserved.source, outcome.plan.name)
        return outcome

    # --- forward ------------------------------------------------------------------------------------------------

    async def _forward(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, reservation: Reservation
    ) -> web.StreamResponse:
        started = time.perf_counter()
        upstream = self._config.upstreams[quote.model.upstream]
        affordable = affordable_output(quote.bound, quote.model, reservation.reserved.payg_nano * FEMTO_PER_NANO)
        if affordable < quote.bound.output_tokens_each or affordable < (quote.ask.max_tokens or 0):
            exchange.max_tokens = affordable
        bound = Bound(quote.bound.input_tokens, quote.bound.answers, affordable, quote.bound.echo)
        body = _forwarded_body(quote, affordable, may_ask_usage=upstream.stream_usage)
        path = next(path for path, operation in METERED.items() if operation == quote.ask.operation)
        self._spent(exchange, "forward", started)
        self._metrics.upstream_started(upstream.name)
        try:
            async with self._client.send(upstream, "POST", path, request.headers, body) as answer:
                if answer.status != 200:
                    return await self._pass_error(exchange, answer)
                if quote.ask.stream and answer.content_type == "text/event-stream":
                    return await self._stream(exchange, request, quote.ask, bound, answer)
                return await self._whole(exchange, quote, bound, answer)
        except UpstreamError as error:
            log.warning("%s: upstream %s: %s", exchange.id, upstream.name, error)
            return self._fail(exchange, _upstream_failure(error))
        finally:
            self._metrics.upstream_ended(upstream.name)

    async def _pass_error(self, exchange: Exchange, answer: UpstreamAnswer) -> web.Response:
        if answer.status in (401, 403):
            log.error("%s: the upstream refuses the gateway's key (status %d)", exchange.id, answer.status)
            return self._fail(exchange, errors.upstream_auth())
        if answer.status < 400:
            return self._fail(exchange, errors.upstream_unavailable())
        body = await answer.body(_MOST_ERROR_BYTES)
        exchange.reason = "upstream_error"
        failure = errors.upstream_error(answer.status)
        headers = {name: answer.headers[name] for name in ("Retry-After", "retry-after-ms") if name in answer.headers}
        if not _is_error_object(body):
            return failure.response(exchange.id, headers)
        response = failure.response(exchange.id, headers)
        response.body = body
        return response

    async def _whole(
        self, exchange: Exchange, quote: Quote, bound: Bound, answer: UpstreamAnswer
    ) -> web.StreamResponse:
        body = await answer.body(self._config.limits.response_bytes)
        read = read_answer(body)
        if read is None:
            log.warning("%s: the upstream's answer is not a JSON object", exchange.id)
            return self._fail(exchange, errors.upstream_unavailable())
        if read.empty:
            tokens = Tokens(0, 0)
        elif read.usage is None:
            tokens = billed_without_usage(quote.ask, bound, read.output_tokens)
        else:
            tokens = billed(read.usage, bound)
        await self._settle(exchange, quote.model, tokens)
        headers = self._credit_headers(exchange)
        return web.Response(body=body, headers={**headers, "Content-Type": _content_type(answer)})

    async def _stream(
        self, exchange: Exchange, request: web.BaseRequest, ask: Ask, bound: Bound, answer: UpstreamAnswer
    ) -> web.StreamResponse:
        model = self._config.models[ask.model]
        events = EventStream(show_usage=ask.wants_usage, several_answers=bound.answers > 1)
        response = web.StreamResponse(
            headers={
                **self._credit_headers(exchange),
                "Content-Type": _content_type(answer),
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            failure = await self._relay(exchange, request, response, events, answer)
            if failure is not None:
                return await self._break_off(exchange, response, failure)
            if not events.failed:
                await self._settle(exchange, model, _streamed_tokens(events, ask, bound))
            if not response.prepared:
                await response.prepare(request)
            await _write(response, events.closing(_cost_fields(exchange.settlement)))
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionResetError):
            # The client hung up: leaving the block stops the upstream; what was sent is paid for.
            if not exchange.ended and events.output_events and not events.failed:
                await self._settle(exchange, model, _streamed_tokens(events, ask, bound))
            raise
        return response

    async def _relay(
        self,
        exchange: Exchange,
        request: web.BaseRequest,
        response: web.StreamResponse,
        events: EventStream,
        answer: UpstreamAnswer,
    ) -> Failure | None:
        """Pass events on until the stream's end; why it broke, or None if it came to its end."""
        try:
            async for chunk in answer.chunks():
                block = events.feed(chunk)
                if block:
                    if not response.prepared:
                        exchange.first_byte = time.perf_counter()
                        await response.prepare(request)
                    await _write(response, block)
                if events.done:
                    return None
        except (UpstreamError, BrokenStream) as error:
            log.warning("%s: the upstream's stream broke: %s", exchange.id, error)
            return _upstream_failure(error)
        if events.failed:
            return None
        log.warning("%s: the upstream's stream ended without [DONE]", exchange.id)
        return errors.upstream_unavailable()

    async def _break_off(
        self, exchange: Exchange, response: web.StreamResponse, failure: Failure
    ) -> web.StreamResponse:
        if not response.prepared:
            return self._fail(exchange, failure)
        # The SDKs take a clean end without [DONE] for success: the stream must end in an error that they see.
        exchange.reason = failure.code
        await _write(response, failure.event(exchange.id))
        await response.write_eof()
        return response

    # --- settle -------------------------------------------------------------------------------------------------

    async def _settle(self, exchange: Exchange, model: Model, tokens: Tokens) -> None:
        started = time.perf_counter()
        assert exchange.reservation is not None
        exchange.ended = True
        exchange.tokens = tokens
        note = f"{model.name} in={tokens.input} out={tokens.output} cached={tokens.cache_read}"
        try:
            exchange.settlement = await self._engine.settle(exchange.reservation, model.prices.femto(tokens), note)
        except StoreError as error:
            # The engine goes on trying; the client has its answer and shall not lose it.
            log.warning("%s: the settlement is put off: %s", exchange.id, error)
        self._spent(exchange, "settle", started)

    def _credit_headers(self, exchange: Exchange) -> dict[str, str]:
        reservation, settlement = exchange.reservation, exchange.settlement
        assert reservation is not None
        funds = reservation.reserved.funds
        headers = {
            "x-request-id": exchange.id,
            "request-id": exchange.id,
            "x-credits-reserved": format_credits(reservation.reserved.held_nano),
            "x-credits-source": reservation.reserved.source,
        }
        if settlement is not None:
            headers["x-credits-cost"] = format_credits(settlement.cost_nano)
            if settlement.cost_nano:
                headers["x-credits-source"] = settlement.source
            funds = settlement.funds or funds
        if exchange.max_tokens is not None:
            headers["x-credits-max-tokens"] = str(exchange.max_tokens)
        return headers | funds_headers(funds)

    # --- models -------------------------------------------------------------------------------------------------

    async def _list_models(self, exchange: Exchange, path: str) -> web.Response:
        name = path.removeprefix("/models").removeprefix("/")
        body = await self._models.one(name) if name else await self._models.all()
        if body is None:
            return self._fail(exchange, errors.unknown_model(name))
        headers = {"x-request-id": exchange.id, "request-id": exchange.id}
        return web.Response(body=body, content_type="application/json", headers=headers)

    # --- reports ------------------------------------------------------------------------------------------------

    def _fail(self, exchange: Exchange, failure: Failure, headers: Mapping[str, str] | None = None) -> web.Response:
        exchange.status = failure.status
        exchange.reason = exchange.reason or failure.code
        return failure.response(exchange.id, headers)

    def _spent(self, exchange: Exchange, phase: Phase, started: float) -> None:
        seconds = time.perf_counter() - started
        exchange.overhead_s += seconds
        self._metrics.overhead(phase, seconds)

    def _decide(self, exchange: Exchange, decision: str, reason: str, plan: str = "other") -> None:
        exchange.decision, exchange.reason = decision, reason if decision == "denied" else None
        self._metrics.decided("admitted" if decision == "admitted" else "denied", reason, plan)

    def _report(self, exchange: Exchange) -> None:
        now = time.perf_counter()
        ask, reservation, identity = exchange.ask, exchange.reservation, exchange.identity
        settlement = exchange.settlement
        first_byte_s = None if exchange.first_byte is None else exchange.first_byte - exchange.started
        if ask is not None and settlement is not None:
            self._metrics.request_finished(
                ask.operation,
                ask.model,
                self._config.models[ask.model].upstream,
                now - exchange.started,
                exchange.tokens.input,
                exchange.tokens.output,
                first_byte_s,
            )
        log_request(
            request_id=exchange.id,
            account=identity.account if identity else None,
            key_id=identity.key_id if identity else None,
            model=ask.model if ask else None,
            status=exchange.status,
            decision=exchange.decision,
            reason=exchange.reason,
            reserved_nano=reservation.reserved.held_nano if reservation else None,
            cost_nano=settlement.cost_nano if settlement else None,
            seconds=now - exchange.started,
            overhead_seconds=exchange.overhead_s,
            first_token_seconds=first_byte_s,
        )


def _secret_of(headers: Mapping[str, str]) -> str | None:
    """The customer's secret, in whichever header its client sends it."""
    authorization = headers.get("Authorization", "")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("token") or None


async def _write(response: web.StreamResponse, block: bytes) -> None:
    """Write, but do not wait for ever for a client that does not read: it counts as gone."""
    try:
        async with asyncio.timeout(_CLIENT_STALL_S):
            await response.write(block)
    except TimeoutError:
        raise ConnectionResetError("the client does not read") from None


async def _read_body(request: web.BaseRequest, most_bytes: int) -> bytes | Failure:
    if (request.content_length or 0) > most_bytes:
        return errors.body_too_large(most_bytes)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts, size = [], 0
    try:
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > most_bytes:
                return errors.body_too_large(most_bytes)
            parts.append(chunk)
    except (web.RequestPayloadError, HTTPException) as error:
        return errors.invalid_body(InvalidRequest(f"it cannot be decoded: {error}"))
    return b"".join(parts)


def _forwarded_body(quote: Quote, max_tokens: int, *, may_ask_usage: bool) -> bytes:
    """The body for the upstream: what was priced, its output limited to what is held, its usage asked for."""
    ask, body = quote.ask, quote.body
    if quote.bound.answers:
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is not None or name == ask.limit_field:
                body[name] = max_tokens
    if ask.stream and may_ask_usage:
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return orjson.dumps(body)


def _upstream_failure(error: Exception) -> Failure:
    return errors.upstream_timeout() if isinstance(error, UpstreamTimeout) else errors.upstream_unavailable()


def _is_error_object(body: bytes) -> bool:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(document, dict) and isinstance(document.get("error"), dict)


def _content_type(answer: UpstreamAnswer) -> str:
    return answer.headers.get("Content-Type", "application/json")


def _streamed_tokens(events: EventStream, ask: Ask, bound: Bound) -> Tokens:
    """The tokens to charge for a stream as far as it went."""
    if events.usage is None:
        if not events.output_events:
            return Tokens(0, 0)
        return billed_without_usage(ask, bound, events.output_events)
    tokens = billed(events.usage, bound)
    if bound.answers > 1 and tokens.output < events.output_events:
        # Of several answers some servers report one; each event with output is a token at least.
        counted = min(events.output_events, bound.tokens(bound.output_tokens_each).output)
        return Tokens(tokens.input, counted, tokens.cache_read)
    return tokens


def _cost_fields(settlement: Settlement | None) -> Mapping[str, object] | None:
    """What the final usage event says of the cost."""
    if settlement is None or settlement.funds is None:
        return None
    funds = settlement.funds
    return {
        "cost": orjson.Fragment(format_credits(settlement.cost_nano)),
        "credits": {
            "cost": format_credits(settlement.cost_nano),
            "source": settlement.source,
            "allowance_remaining": format_credits(funds.allowance_remaining_nano),
            "allowance_resets_at": None if funds.resets_at_ms is None else rfc3339(funds.resets_at_ms),
            "balance": format_credits(funds.balance_nano),
        },
    }
