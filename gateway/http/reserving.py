"""Credits held for a request before it is forwarded, or the answer that refuses it."""

import time
from collections.abc import Mapping

from aiohttp import web

from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, RepeatKey, Reservation
from gateway.domain.decision import Denied, Repeated
from gateway.domain.forecast import OutputForecast
from gateway.domain.plan import Plan
from gateway.http import errors
from gateway.http.errors import funds_headers
from gateway.http.exchange import Exchange
from gateway.http.holding import holding_of
from gateway.http.quote import Quote
from gateway.http.reports import Reports


class Reserving:
    """Reserves for requests, each by the length of the answers that came before."""

    def __init__(
        self, engine: CreditEngine, reports: Reports, forecast: OutputForecast, plans: Mapping[str, Plan]
    ) -> None:
        self._engine = engine
        self._reports = reports
        self._forecast = forecast
        self._plans = plans

    def use(self, plans: Mapping[str, Plan]) -> None:
        """Know these plans from now on."""
        self._plans = plans

    async def reserve(
        self, exchange: Exchange, identity: Identity, quote: Quote, repeat: RepeatKey | None
    ) -> Reservation | web.Response:
        """Hold what the request may cost; the answer that says why not, where it is refused. Raises StoreError and
        UnknownPlan."""
        started = time.perf_counter()
        holding = holding_of(quote, exchange.config.upstreams, self._forecast)
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
            exchange.reservation, exchange.slices = outcome, holding.slices
            self._reports.admitted(exchange, outcome)
            return outcome
        return self._refuse(exchange, quote, outcome)

    def _refuse(self, exchange: Exchange, quote: Quote, outcome: Denied | Refused | Repeated) -> web.Response:
        match outcome:
            case Refused():
                return self._reports.fail(exchange, errors.bad_key())
            case Repeated():
                failure = errors.repeated(outcome)
                self._reports.denied(exchange, failure.code)
                return self._reports.fail(exchange, failure)
            case Denied():
                # The account may have come to a plan that was configured after the request began.
                name = outcome.funds.plan
                plan = exchange.config.plans.get(name) or self._plans[name]
                failure = errors.denied(outcome, plan, quote.bound, quote.model)
                self._reports.denied(exchange, failure.code, name)
                return self._reports.fail(exchange, failure, funds_headers(outcome.funds))
