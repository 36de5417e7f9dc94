"""Sends a request to its upstream, and makes the client's answer of what comes back."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import orjson
from aiohttp import web

from gateway.apis.api import Api
from gateway.apis.free import FreeApi
from gateway.config.model import Upstream
from gateway.credits.service import Reservation
from gateway.domain.price import FEMTO_PER_NANO
from gateway.domain.request import affordable_output
from gateway.http import errors
from gateway.http.exchange import Exchange, credit_headers, request_headers
from gateway.http.holding import payable_nano
from gateway.http.quote import Quote, forwarded_body
from gateway.http.relay import StreamRelay
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamAnswer, UpstreamClient

log = logging.getLogger(__name__)

_MOST_ERROR_BYTES = 2**20
_MOST_RETRY_S = 60


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

    async def metered(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, reservation: Reservation
    ) -> web.StreamResponse:
        """Forward within what is held, and charge the answer."""
        started = time.perf_counter()
        upstream = exchange.config.upstreams[quote.model.upstream]
        quote = _within_hold(exchange, quote, reservation)
        body = forwarded_body(quote, upstream)
        self._reports.spent(exchange, "forward", started)
        async with self._sent(exchange, request, upstream, _target_of(request, quote.api), body) as answer:
            if answer.status != 200:
                return await self._pass_error(exchange, answer)
            if quote.ask.stream and answer.content_type == "text/event-stream":
                return await self._relay.relay(exchange, request, quote, answer)
            return await self._whole(exchange, quote, answer)

    async def free(
        self, exchange: Exchange, request: web.BaseRequest, upstream: Upstream, api: FreeApi, body: bytes
    ) -> web.Response:
        """Forward as it is, and pass the answer on."""
        async with self._sent(exchange, request, upstream, _target_of(request, api), body) as answer:
            if answer.status != 200:
                return await self._pass_error(exchange, answer)
            said = await answer.body(exchange.config.limits.response_bytes)
            headers = {**request_headers(exchange), "Content-Type": answer.content_type_header}
            return web.Response(body=said, headers=headers)

    @asynccontextmanager
    async def _sent(
        self, exchange: Exchange, request: web.BaseRequest, upstream: Upstream, path: str, body: bytes
    ) -> AsyncIterator[UpstreamAnswer]:
        self._metrics.upstream_started(upstream.name)
        try:
            async with self._client.send(upstream, "POST", path, request.headers, body) as answer:
                yield answer
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
        return self._reports.fail(exchange, failure, _retry_header(answer))

    async def _whole(self, exchange: Exchange, quote: Quote, answer: UpstreamAnswer) -> web.StreamResponse:
        body = await answer.body(exchange.config.limits.response_bytes)
        read = quote.api.read_answer(body)
        if read is None:
            log.warning("%s: the upstream's answer is of no use", exchange.id)
            return self._reports.fail(exchange, errors.upstream_unavailable())
        self._reports.watch_overrun(exchange, quote, read.usage)
        await self._settling.charge(exchange, quote.model, read.metered(quote.ask, quote.bound))
        headers = credit_headers(exchange)
        return web.Response(body=body, headers={**headers, "Content-Type": answer.content_type_header})


def _target_of(request: web.BaseRequest, api: Api | FreeApi) -> str:
    """The path below the upstream's base URL, and of the query what the endpoint knows, as it came."""
    pairs = request.rel_url.raw_query_string.split("&")
    known = "&".join(pair for pair in pairs if pair.partition("=")[0] in api.parameters)
    return f"{api.path}?{known}" if known else api.path


def _within_hold(exchange: Exchange, quote: Quote, reservation: Reservation) -> Quote:
    """The quote with its output limited to what the account can pay."""
    payable = reservation.reserved.payg_nano
    if exchange.slice_tokens is not None:  # the hold will grow, as far as there are credits
        payable = max(payable, payable_nano(reservation.reserved.funds, reservation.plan))
    affordable = affordable_output(quote.bound, quote.model, payable * FEMTO_PER_NANO)
    if affordable < quote.bound.output_tokens_each or affordable < (quote.ask.max_tokens or 0):
        exchange.max_tokens = affordable
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
