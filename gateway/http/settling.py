"""Charges a request for what its answer came to."""

import logging
import time

from gateway.credits.errors import EngineError, StoreError
from gateway.credits.service import CreditEngine
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.http.exchange import Exchange
from gateway.http.holding import note_of
from gateway.http.reports import Reports

log = logging.getLogger(__name__)


class Settling:
    """The one place where a request is charged."""

    def __init__(self, engine: CreditEngine, reports: Reports) -> None:
        self._engine = engine
        self._reports = reports

    async def charge(self, exchange: Exchange, model: Model, most_femto: int, tokens: Metered) -> None:
        """Settle the exchange's reservation, which has ended then whatever the store says: tokens at the prices of the
        model that answered, never more than most_femto (femto-credits at list price). Raises only what cancels."""
        started = time.perf_counter()
        assert exchange.reservation is not None
        exchange.ended = True
        exchange.metered = tokens
        note = note_of(exchange, model, tokens)
        try:
            femto = model.prices.femto(tokens)
            charged_femto = femto if femto < most_femto else most_femto  # min() takes 1,000 instructions
            exchange.settlement = await self._engine.settle(exchange.reservation, charged_femto, note)
        except StoreError as error:
            # The engine goes on trying; the client has its answer and shall not lose it.
            log.warning("%s: the settlement is put off: %s", exchange.id, error)
        except EngineError as error:
            log.error("%s: the settlement is impossible: %s", exchange.id, error)
        self._reports.spent(exchange, "settle", started)
