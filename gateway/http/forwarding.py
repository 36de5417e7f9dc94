"""Sends a request to its upstream, and makes the client's answer of what comes back."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import orjson
from aiohttp import web
from multidict import CIMultiDict

from gateway.apis.api import Api
from gateway.apis.free import FreeApi
from gateway.config.model import Upstream
from gateway.credits.service import Reservation
from gateway.domain.model import Model
from gateway.domain.price import FEMTO_PER_NANO
from gateway.domain.request import affordable_output
from gateway.http import errors
from gateway.http.exchange import Exchange, credit_lines, request_headers
from gateway.http.holding import payable_nano
from gateway.http.multipart import written
from gateway.http.passing import Passing
from gateway.http.passthrough import UnreadBody
from gateway.http.quote import Quote, forwarded_body
from gateway.http.relay import StreamRelay
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.http.whole import WholeAnswer
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import Pieces, Upload, UpstreamAnswer, UpstreamClient, UpstreamUnavailable

log = logging.getLogger(__name__)

_MOST_ERROR_BYTES = 2**20
_MOST_RETRY_S = 60
_BETAS = "anthropic-beta"
_WIDE_CONTEXT = re.compile(r"context-([0-9]{1,3})m")


class Forwarding:
    """Forwards requests: those that hold credits, and those that are free. Raises UpstreamError where nothing came."""

    def __init__(
        self, client: UpstreamClient, metrics: Metrics, reports: Reports, settling: Settling, relay: StreamRelay
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._reports = reports
        self._settling = settling
        self._relay = relay
        self._passing = Passing(settling)

    async def metered(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, reservation: Reservation
    ) -> web.StreamResponse:
        """Forward within what is held, to the first model whose upstream takes it, and charge the answer."""
        for one in (quote, *quote.alternatives[:-1]) if quote.alternatives else ():
            response = await self._unless_it_fails(exchange, request, one, reservation)
            if response is not None:
                return response
        last = quote.alternatives[-1] if quote.alternatives else quote
        sent, upstream, body = self._prepared(exchange, last, reservation)
        target, headers = _target_of(request, last.api), _headers_of(request, last.model)
        inflight = self._metrics.upstream_inflight(upstream.name)
        inflight.total += 1
        try:
            answer = None if isinstance(body, Upload) else self._client.begin(upstream, target, headers, body)
            if answer is None:
                async with self._client.send(upstream, "POST", target, headers, body) as answer:
                    return await self._answer(exchange, request, sent, answer)
            try:
                await answer.head()
                return await self._answer(exchange, request, sent, answer)
            finally:
                answer.abandon()  # nothing, if it is whole
        finally:
            inflight.total -= 1

    async def _unless_it_fails(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, reservation: Reservation
    ) -> web.StreamResponse | None:
        """The answer of a model that has a fallback; None where its upstream fails before it answers."""
        sent, upstream, body = self._prepared(exchange, quote, reservation)
        target, headers = _target_of(request, quote.api), _headers_of(request, quote.model)
        answered = False
        try:
            async with self._sent(upstream, target, headers, body) as answer:
                answered = not _is_the_upstreams_fault(answer.status)
                if answered:
                    return await self._answer(exchange, request, sent, answer)
                log.warning("%s: %s answers %d, its fallback is asked", exchange.id, quote.model.name, answer.status)
        except UpstreamUnavailable as error:
            if answered:
                raise
            log.warning("%s: %s is not to be had, its fallback is asked: %s", exchange.id, quote.model.name, error)
        return None

    async def unread(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, target: str, body: UnreadBody
    ) -> web.StreamResponse:
        """Forward what nobody reads (target: path and query below the upstream's base URL), and charge the answer."""
        upstream = exchange.config.upstreams[quote.model.upstream]
        exchange.answering = quote.model
        try:
            async with self._sent(upstream, target, request.headers, body.upload(), request.method) as answer:
                body.answer = answer
                if not 200 <= answer.status < 300:
                    return await self._pass_error(exchange, answer)
                return await self._passing.pass_on(exchange, request, quote, answer)
        except asyncio.CancelledError:
            # Who has left before the answer may fetch later what was begun here; who is sent away has not left.
            if body.sent and body.answer is None and request.transport is None:
                await self._passing.charge(exchange, quote)
            raise

    def _prepared(
        self, exchange: Exchange, quote: Quote, reservation: Reservation
    ) -> tuple[Quote, Upstream, bytes | Pieces | Upload]:
        """The quote within what is held, where it goes, and its body there."""
        started = time.perf_counter()
        upstream = exchange.config.upstreams[quote.model.upstream]
        quote = _within_hold(exchange, quote, reservation)
        body: bytes | Pieces | Upload
        if quote.form is not None:
            body = written(quote.form, quote.model.sent_as or quote.model.name)
        else:
            body = forwarded_body(quote, upstream)
        self._reports.spent(exchange, "forward", started)
        return quote, upstream, body

    def _answer(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, answer: UpstreamAnswer
    ) -> Awaitable[web.StreamResponse]:
        # Each is a coroutine already: one around them would be entered and left at every wait.
        exchange.answering = quote.model
        if answer.status != 200:
            return self._pass_error(exchange, answer)
        if quote.ask.stream and answer.content_type == "text/event-stream":
            return self._relay.relay(exchange, request, quote, answer)
        if quote.api.passes_bytes and answer.content_type != "application/json":
            return self._passing.pass_on(exchange, request, quote, answer)
        return self._whole(exchange, quote, answer)

    async def free(
        self, exchange: Exchange, request: web.BaseRequest, upstream: Upstream, api: FreeApi, body: bytes
    ) -> web.Response:
        """Forward as it is, and pass the answer on."""
        async with self._sent(upstream, _target_of(request, api), request.headers, body) as answer:
            if answer.status != 200:
                return await self._pass_error(exchange, answer)
            said = await answer.body(exchange.config.limits.response_bytes)
            headers = {**request_headers(exchange), "Content-Type": answer.content_type_header}
            return web.Response(body=said, headers=headers)

    @asynccontextmanager
    async def _sent(
        self,
        upstream: Upstream,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Pieces | Upload | None,
        method: str = "POST",
    ) -> AsyncIterator[UpstreamAnswer]:
        inflight = self._metrics.upstream_inflight(upstream.name)
        inflight.total += 1
        try:
            async with self._client.send(upstream, method, target, headers, body) as answer:
                yield answer
        finally:
            inflight.total -= 1

    async def _pass_error(self, exchange: Exchange, answer: UpstreamAnswer) -> web.Response:
        if answer.status in (401, 402, 403):  # about the operator's key or credits, not the customer's
            log.error("%s: the upstream refuses the gateway's key (status %d)", exchange.id, answer.status)
            return self._reports.fail(exchange, errors.upstream_auth())
        if answer.status < 400:
            return self._reports.fail(exchange, errors.upstream_unavailable())
        body = await answer.body(_MOST_ERROR_BYTES)
        exchange.reason = "upstream_error"
        failure = errors.upstream_error(answer.status, _error_of(body))
        return self._reports.fail(exchange, failure, _retry_header(answer))

    async def _whole(self, exchange: Exchange, quote: Quote, answer: UpstreamAnswer) -> web.StreamResponse:
        most_bytes = exchange.config.limits.response_bytes
        body = answer.body_at_hand(most_bytes) or await answer.body(most_bytes)
        read = quote.api.answer_to(quote.ask, body)
        if read is None:
            log.warning("%s: the upstream's answer is of no use", exchange.id)
            return self._reports.fail(exchange, errors.upstream_unavailable())
        metered, usage = read.metered(quote.ask, quote.bound), read.usage
        if usage is not None and (usage.input_tokens, usage.output_tokens) != (metered.input, metered.output):
            self._reports.watch_overrun(
                exchange, quote, usage
            )  # what is charged as it was reported is within the bound
        await self._settling.charge(exchange, quote.model, quote.most_femto, metered)
        return WholeAnswer(200, credit_lines(exchange), answer.content_type_header, body)


def _headers_of(request: web.BaseRequest, model: Model) -> Mapping[str, str]:
    """The client's headers, without a beta that lets in more than is held for: Anthropic's wider context window."""
    if _BETAS not in request.headers:
        return request.headers
    betas = [beta.strip() for line in request.headers.getall(_BETAS, ()) for beta in line.split(",")]
    kept = [beta for beta in betas if _window_of(beta) <= model.context_window]
    if kept == betas:
        return request.headers
    headers = CIMultiDict(request.headers)
    headers[_BETAS] = ",".join(kept)
    return headers


def _window_of(beta: str) -> int:
    """The context window that a beta opens, in tokens; 0 for any other beta."""
    wide = _WIDE_CONTEXT.match(beta)
    return int(wide[1]) * 1_000_000 if wide else 0


def _target_of(request: web.BaseRequest, api: Api | FreeApi) -> str:
    """The path below the upstream's base URL, and of the query what the endpoint knows, as it came."""
    query = request.rel_url.raw_query_string
    known = "&".join(pair for pair in query.split("&") if pair.partition("=")[0] in api.parameters) if query else ""
    return f"{api.path}?{known}" if known else api.path


def _is_the_upstreams_fault(status: int) -> bool:
    """Whether another upstream may do better: this one is busy, broken, or refuses the gateway's own key."""
    return status in (401, 402, 403, 429) or status >= 500


def _within_hold(exchange: Exchange, quote: Quote, reservation: Reservation) -> Quote:
    """The quote with its output limited to what the account can pay."""
    exchange.max_tokens = None
    if quote.bound.indivisible:  # all of it is held
        return quote
    payable = reservation.reserved.payg_nano
    if (
        exchange.slices and exchange.slices.get(quote.model.name) is not None
    ):  # the hold will grow, as far as there are credits
        payable = max(payable, payable_nano(reservation.reserved.funds, reservation.plan))
    affordable = most = quote.bound.output_tokens_each
    fixed_femto, token_femto = quote.worst
    if payable * FEMTO_PER_NANO < fixed_femto + most * token_femto:
        affordable = affordable_output(quote.bound, quote.model, payable * FEMTO_PER_NANO)
    if affordable < most or affordable < (quote.ask.max_tokens or 0):
        exchange.max_tokens = affordable
    if affordable == most:
        return quote
    return replace(quote, bound=replace(quote.bound, output_tokens_each=affordable))


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
