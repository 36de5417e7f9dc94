"""What the gateway says of a request besides answering it: the log line, the metrics, the error's body."""

import logging
import time
from collections.abc import Mapping

from aiohttp import web

from gateway.credits.service import Reservation
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange
from gateway.http.quote import Quote
from gateway.telemetry.logs import log_request
from gateway.telemetry.metrics import Metrics, Phase
from gateway.upstream.usage import Usage, exceeds

log = logging.getLogger(__name__)


class Reports:
    """Keeps an Exchange's story and tells it at the end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._observe = {phase: histogram.observe for phase, histogram in metrics.phases.items()}

    def fail(self, exchange: Exchange, failure: Failure, headers: Mapping[str, str] | None = None) -> web.Response:
        """The error's answer; noted for the log."""
        exchange.status = failure.status
        exchange.reason = exchange.reason or failure.code
        return _in_dialect(exchange, failure).response(exchange.id, headers)

    def event(self, exchange: Exchange, failure: Failure) -> bytes:
        """The same as the last event of a stream that has begun, in the form of that stream."""
        assert exchange.events is not None
        return exchange.events.error_event(_in_dialect(exchange, failure).body(exchange.id))

    def spent(self, exchange: Exchange, phase: Phase, started: float) -> None:
        """Add the time since started (time.perf_counter) to the gateway's own part of the request."""
        seconds = time.perf_counter() - started
        exchange.overhead_s += seconds
        self._observe[phase](seconds)

    def admitted(self, exchange: Exchange, reservation: Reservation) -> None:
        """Note that the request holds credits."""
        exchange.decision, exchange.reason = "admitted", None
        self._metrics.decided("admitted", reservation.reserved.source, reservation.plan.name)

    def denied(self, exchange: Exchange, code: str, plan: str = "other") -> None:
        """Note that the request is refused credits, by the error's code."""
        exchange.decision, exchange.reason = "denied", code
        self._metrics.decided("denied", code, plan)

    def free(self, exchange: Exchange) -> None:
        """Note that the request costs nothing."""
        exchange.decision = "free"

    def truncated(self, exchange: Exchange) -> None:
        """Note that a stream was ended because credits had."""
        assert exchange.reservation is not None
        exchange.reason = "credits_exhausted"
        self._metrics.stream_truncated(exchange.reservation.plan.name)

    def finished(self, exchange: Exchange) -> None:
        """Write the log line, and the metrics of a request that was charged."""
        now = time.perf_counter()
        ask, reservation, identity = exchange.ask, exchange.reservation, exchange.identity
        settlement = exchange.settlement
        first_byte_s = None if exchange.first_byte is None else exchange.first_byte - exchange.started
        if ask is not None and settlement is not None and exchange.answering is not None:
            self._metrics.request_finished(
                ask.operation,
                ask.model,
                exchange.answering.upstream,
                now - exchange.started,
                exchange.metered.input,
                exchange.metered.output,
                first_byte_s,
            )
        log_request(
            request_id=exchange.id,
            account=identity.account if identity else None,
            key_id=f"key_{identity.key_id}" if identity else None,
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

    def watch_overrun(self, exchange: Exchange, quote: Quote, usage: Usage | None) -> None:
        """The customer pays no more than was reserved; what the operator may be billed beyond that is never silent."""
        if usage is not None and exceeds(usage, quote.bound):
            log.error("%s: %s reports %s, more than the bound %s", exchange.id, quote.model.name, usage, quote.bound)
            self._metrics.overrun(quote.model.upstream)


def _in_dialect(exchange: Exchange, failure: Failure) -> Failure:
    return failure.for_anthropic() if exchange.dialect == "anthropic" else failure
