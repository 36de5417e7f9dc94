"""One response of a realtime session: reserved before it can begin, held for while it flows, charged at its end.

Each is a request of its own, with an id of its own, to the engine, the ledger, the log and the metrics.
"""

import logging
import time
from dataclasses import dataclass, replace

from gateway.apis.realtime_answers import OutputTally, RealtimeUsage
from gateway.apis.realtime_conversation import Reach, Size
from gateway.config.model import GatewayConfig, Upstream
from gateway.credits.service import LEASE_MS, CreditEngine, Identity, Refused, Reservation, Seen
from gateway.domain.decision import Denied, Funds
from gateway.domain.forecast import OutputForecast
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.plan import Plan
from gateway.domain.request import MIN_OUTPUT_TOKENS, Ask, Bound, worst_femto
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange
from gateway.http.holding import note_of
from gateway.http.realtime_hold import TurnHold
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counter:
    """Where turns are paid: everything that they share over all sessions."""

    engine: CreditEngine
    settling: Settling
    reports: Reports
    metrics: Metrics
    forecast: OutputForecast


@dataclass(frozen=True, slots=True)
class NoTurn:
    """Why a turn cannot be reserved. funds: the account's, where credits are the reason."""

    failure: Failure
    funds: Funds | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """The most that a turn can use. audio_ms: of audio that is paid by its length. whole: all output is held for from
    the start, because what the client sees says nothing about it."""

    size: Size
    output_most: int
    audio_ms: int = 0
    whole: bool = False

    def most_femto(self, model: Model, output_tokens: int) -> int:
        """What it can cost by list price, with so much output."""
        output = self.output_most if self.whole else min(self.output_most, output_tokens)
        most = Metered(input=self.size.most, output=output, audio_ms=self.audio_ms, requests=1)
        return model.prices.most_femto(most)

    def bound(self) -> Bound:
        """The same as of any request."""
        return Bound(self.size.most, 1, self.output_most, units=Metered(audio_ms=self.audio_ms, requests=1))


class Turn:
    """What credits are held for: a response, or a transcription. reach: how much of the conversation is its input, if
    its usage can tell. handed_out: whether the client got any of its output. event_id: of what asked for it; client_id:
    the one that the client gave that, if any."""

    def __init__(
        self, counter: Counter, exchange: Exchange, model: Model, reservation: Reservation, use: Use, slice_tokens: int
    ) -> None:
        upstream = exchange.config.upstreams[model.upstream]
        self.exchange = exchange
        self.use = use
        self.reach: Reach | None = None
        self.event_id = ""
        self.client_id: str | None = None
        self.handed_out = False
        self.tally = OutputTally(upstream.count_output)
        self._handed_tokens = self._handed_audio = 0
        self._counter = counter
        self._model = model
        self._reservation = reservation
        self._hold = TurnHold(counter.engine, reservation, self._need, slice_tokens)

    @property
    def funds(self) -> Funds:
        """The account's, as of the last that was heard from the store."""
        return self._reservation.reserved.funds

    @property
    def reservation(self) -> Reservation:
        """What is held."""
        return self._reservation

    async def cover(self, *, patient: bool) -> None:
        """Wait until what it has used by now is held for; patient: also for other requests of the account, which may
        end. Raises CreditsEnded and StoreError."""
        await self._hold.cover(patient=patient)

    def begin(self, size: Size) -> None:
        """It is asked for, or has begun, with this input."""
        self.resize(size)
        self.exchange.started = time.perf_counter()
        self._reservation.look = self._seen  # whatever is lost with this gateway is charged as far as this says

    def resize(self, size: Size) -> None:
        """Its input can be of this size by now."""
        self.use = replace(self.use, size=size)

    def give_back(self) -> None:
        """What it was asked for did not come to anything; it may begin another time."""
        self.event_id, self.client_id, self.reach = "", None, None
        self._reservation.look = None

    def hand_out(self) -> None:
        """The client gets what was counted by now."""
        if not self.handed_out:
            self.handed_out, self.exchange.first_byte = True, time.perf_counter()
        self._handed_tokens, self._handed_audio = self.tally.billable, self.tally.audio_tokens

    def usage_billed(self, usage: RealtimeUsage) -> Metered:
        """The tokens to charge for a usage."""
        if usage.input_tokens > self.use.size.most or usage.output_tokens > self.use.output_most:
            log.error("%s: %s reports %s, more than the bound", self.exchange.id, self._model.name, usage)
            self._counter.metrics.overrun(self._model.upstream)
        return usage.billed(self.use.size.most, self.use.output_most)

    def handed_out_billed(self, usage: RealtimeUsage | None) -> Metered:
        """The tokens to charge for what was handed out of a response that got no further. usage: what the upstream says
        of it, if it has."""
        seen = min(self._handed_tokens, self.use.output_most)
        if usage is not None:
            return usage.billed(self.use.size.most, seen)
        return replace(self.use.size.estimated(), output=seen, audio_output=min(self._handed_audio, seen))

    def counted_billed(self) -> Metered:
        """The tokens to charge for a response that came to its end without a usage."""
        self.hand_out()
        return self.handed_out_billed(None)

    async def settle(self, metered: Metered, status: int = 200) -> None:
        """Charge it. Raises only what cancels."""
        self._end(status)
        try:
            bound = self.use.bound()
            most_femto = worst_femto(bound, self._model, bound.output_tokens_each)
            await self._counter.settling.charge(self.exchange, self._model, most_femto, metered)
        finally:
            self._counter.reports.finished(self.exchange)

    async def void(self) -> None:
        """Give back what is held: it has not begun, or it broke at the upstream."""
        self._end(502)
        self.exchange.ended = True
        await self._counter.engine.void(self._reservation)

    def _end(self, status: int) -> None:
        self._hold.close()
        self._reservation.look = None
        self.exchange.status = status

    def learn(self) -> None:
        """Take note of how long it was."""
        self._counter.forecast.add(self._model.name, self.tally.tokens)

    def _need(self, ahead_tokens: int) -> int:
        return self.use.most_femto(self._model, self.tally.tokens + ahead_tokens)

    def _seen(self) -> Seen:
        metered = self.handed_out_billed(None) if self.handed_out else Metered()
        return Seen(self._model.prices.femto(metered), note_of(self.exchange, self._model, metered))


def use_of(model: Model, upstream: Upstream, size: Size) -> Use:
    """What a response to an input of this size can use."""
    whole = model.hidden_reasoning or upstream.count_output == "maximum"
    return Use(size, min(model.max_output_tokens, model.context_window), whole=whole)


async def reserve_turn(
    counter: Counter, config: GatewayConfig, identity: Identity, model: Model, use: Use
) -> Turn | NoTurn:
    """Hold for its input and a slice of its output, or for all. Raises StoreError and UnknownPlan."""
    exchange = Exchange(config, identity=identity, ask=Ask("realtime", model.name, None), answering=model)
    started = time.perf_counter()
    each = use.output_most if use.whole else counter.forecast.expected(model.name, use.output_most)
    least = use.most_femto(model, MIN_OUTPUT_TOKENS)
    amount = use.most_femto(model, each)
    outcome = await counter.engine.reserve(
        identity, exchange.number, model.name, amount, amount, LEASE_MS, alone_femto=least, grows=True
    )
    counter.reports.spent(exchange, "reserve", started)
    if isinstance(outcome, Reservation):
        exchange.reservation = outcome
        counter.reports.admitted(exchange, outcome)
        return Turn(counter, exchange, model, outcome, use, each)
    if isinstance(outcome, Denied):
        name = outcome.funds.plan
        failure = errors.denied(outcome, config.plans.get(name, Plan(name)), use.bound(), model)
        counter.reports.denied(exchange, failure.code, name)
        return NoTurn(failure, outcome.funds)
    assert isinstance(outcome, Refused), "no turn has an idempotency key"
    return NoTurn(errors.bad_key())
