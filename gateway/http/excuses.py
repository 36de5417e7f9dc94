"""What a client is told, or shown, of what no other room has an answer for."""

import logging
from contextlib import suppress

from aiohttp import web

from gateway.credits.errors import StoreError, UnknownPlan
from gateway.http import errors
from gateway.http.exchange import Exchange
from gateway.http.reports import Reports
from gateway.http.writing import write
from gateway.telemetry.metrics import STORE_UNAVAILABLE
from gateway.upstream.client import UpstreamError

log = logging.getLogger(__name__)


class Excuses:
    """Ends requests that something went wrong with."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def excuse(self, exchange: Exchange, error: Exception) -> web.StreamResponse:
        """The answer to a request that something went wrong with before any answer had begun."""
        match error:
            case StoreError():
                log.warning("%s: %s", exchange.id, error)
                self._reports.denied(exchange, STORE_UNAVAILABLE)
                return self._reports.fail(exchange, errors.store_unavailable())
            case UnknownPlan():
                account = exchange.identity.account if exchange.identity else ""
                log.error("%s: %s; move its account: accounts set-plan %s PLAN", exchange.id, error, account)
                return self._reports.fail(exchange, errors.plan_not_configured(error.plan))
            case UpstreamError():
                log.warning("%s: the upstream did not answer: %s", exchange.id, error)
                return self._reports.fail(exchange, errors.upstream_failed(error))
            case ConnectionResetError():
                exchange.reason = "client_closed"
                return web.Response(status=exchange.status)  # nobody is there to read it
        log.error("%s failed", exchange.id, exc_info=error)
        return self._reports.fail(exchange, errors.internal_error())

    async def cut(
        self, exchange: Exchange, request: web.BaseRequest, response: web.StreamResponse, error: Exception
    ) -> web.StreamResponse:
        """End a stream that has begun and cannot go on; a second answer must not be written into it."""
        exchange.status, exchange.reason = response.status, "client_closed"
        if not isinstance(error, ConnectionResetError):
            log.error("%s failed while streaming", exchange.id, exc_info=error)
            exchange.reason = "internal_error"
            with suppress(ConnectionResetError):
                if exchange.events is not None:
                    await write(request, response, self._reports.event(exchange, errors.internal_error()))
        if request.transport is not None:
            # What waits for a client that does not read would keep the connection for ever.
            gone = isinstance(error, ConnectionResetError)
            request.transport.abort() if gone else request.transport.close()
        return response
