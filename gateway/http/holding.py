"""How much a request holds: the most that it can cost, or, of a stream, a little that grows as it flows."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache

import orjson

from gateway.config.model import Upstream
from gateway.credits.errors import EngineError, StoreError, StoreUnavailable
from gateway.credits.service import CreditEngine, Seen
from gateway.domain.decision import Funds
from gateway.domain.forecast import OutputForecast
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.plan import FULL_RATE_PPM, Plan
from gateway.domain.price import FEMTO_PER_NANO
from gateway.domain.request import least_output
from gateway.domain.value import value
from gateway.http.exchange import Exchange
from gateway.http.quote import Quote
from gateway.upstream.sse import UNLIMITED, EventStream

log = logging.getLogger(__name__)

#: Between two tries to get more, while the account has nothing free or the store does not answer: at first, at most.
_PAUSE_FIRST_S, _PAUSE_MOST_S = 0.15, 1.0
#: How long a stream that has used up its hold waits for a store that does not answer.
STORE_WAIT_S = 10.0


class CreditsEnded(Exception):
    """A stream has used up its hold, and the account has nothing free."""


@value(frozen=True, slots=True)
class Holding:
    """What to reserve for a request, in femto-credits at list price.

    minimum_femto is needed while other requests of the account are in flight; without any, alone_femto is enough.
    slices: by model that may answer, the output of each answer that a stream holds at a time; without those of which
    all is held at once. grows: more may be held later.
    """

    amount_femto: int
    minimum_femto: int
    alone_femto: int
    slices: Mapping[str, int]
    grows: bool


def holding_of(quote: Quote, upstreams: Mapping[str, Upstream], forecast: OutputForecast) -> Holding:
    """What a request is to hold before it is forwarded: enough for whichever model will answer."""
    first = _holding_of(quote, upstreams, forecast)
    for other in quote.alternatives:
        more = _holding_of(other, upstreams, forecast)
        first = Holding(
            max(first.amount_femto, more.amount_femto),
            max(first.minimum_femto, more.minimum_femto),
            max(first.alone_femto, more.alone_femto),
            {**first.slices, **more.slices},
            grows=first.grows or more.grows,
        )
    return first


def _holding_of(quote: Quote, upstreams: Mapping[str, Upstream], forecast: OutputForecast) -> Holding:
    bound, model = quote.bound, quote.model
    fixed_femto, token_femto = quote.worst
    most, least_femto = bound.output_tokens_each, fixed_femto + least_output(bound) * token_femto
    if not (quote.ask.stream and _follows(quote, upstreams[model.upstream])):
        return Holding(fixed_femto + most * token_femto, least_femto, least_femto, {}, False)
    each = forecast.expected(model.name, most)
    # While others stream, less than a whole slice would admit an answer only to cut it soon after.
    amount_femto = fixed_femto + each * token_femto
    return Holding(amount_femto, amount_femto, least_femto, {model.name: each}, each < most)


def _follows(quote: Quote, upstream: Upstream) -> bool:
    """Whether what a stream shows while it comes tells what it costs."""
    ask = quote.ask
    hides = ask.hides_output or quote.model.hidden_reasoning or upstream.count_output == "maximum"
    return not hides and not ask.indivisible


def payable_nano(funds: Funds, plan: Plan) -> int:
    """The list-price cost that all of an account's credits could pay now, those that requests in flight hold too."""
    idle = min((max(0, window.granted_nano - window.used_nano) for window in funds.windows), default=0)
    return idle * FULL_RATE_PPM // plan.rate_ppm + (funds.balance_nano if plan.payg else 0)


def note_of(exchange: Exchange, model: Model, metered: Metered) -> str:
    """What the ledger says of a charge: the version of the price, what was metered, where the request came from, and
    which model answered in place of the one asked."""
    assert exchange.identity is not None
    source = exchange.identity.source
    if metered.is_plain and (exchange.ask is None or exchange.ask.model == model.name):
        before, behind = _note_around(model.price_version, source)
        return f'{before}{metered.input},"output":{metered.output}{behind}'
    note = {"price": model.price_version, "tokens": metered.figures(), "source": source}
    if exchange.ask is not None and exchange.ask.model != model.name:
        note["answered_by"] = model.name
    return orjson.dumps(note).decode()


@lru_cache(maxsize=4096)
def _note_around(price_version: str, source: str) -> tuple[str, str]:
    """What a note says before its input and behind its output: 3 k instructions less than to write all of it anew."""
    note = {"price": price_version, "tokens": {"input": 0}, "source": source}
    before, behind = orjson.dumps(note).decode().rsplit("0}", 1)
    return before, "}" + behind


class StreamHold:
    """Keeps a stream's hold ahead of what the stream has shown.

    covered: the output tokens, of all answers, that the client may be handed so far. ``follow`` asks for more in good
    time, in a task of its own, so that the stream flows on meanwhile; ``more`` waits for it where it must.
    """

    def __init__(self, engine: CreditEngine, exchange: Exchange, quote: Quote, events: EventStream) -> None:
        """quote: as it was forwarded, its bound's output that which the upstream was limited to."""
        assert exchange.reservation is not None
        bound, model = quote.bound, quote.model
        self._engine = engine
        self._exchange = exchange
        self._reservation = exchange.reservation
        self._model = model
        self._events = events
        self._most = bound.most_output_tokens
        self._slice = bound.output_tokens(exchange.slices.get(model.name) or bound.output_tokens_each)
        # All but the output that grows.
        self._fixed_femto = model.prices.most_of(bound.input_tokens, 0, bound.units)
        self._output_femto = model.prices.dearest_femto(bound.input_tokens)[1]
        self._wanted = 0
        self._ended = False
        self._store_error: StoreError | None = None
        self._task: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()
        self._hurry = asyncio.Event()
        self._reservation.look = self._seen  # whatever is lost with this gateway is charged as far as this says
        self.covered = self._covered_by(exchange.reservation.reserved.payg_nano)

    def follow(self) -> None:
        """Take note of what the stream has shown by now. Never waits."""
        self._wanted = max(self._wanted, self._events.wanted)
        self._extend_if_low()

    @property
    def enough_until(self) -> int:
        """As long as no more output tokens than this are counted, there is nothing to follow."""
        return self.covered - self._slice // 2

    async def more(self) -> None:
        """Wait until more is covered than now.

        Raises CreditsEnded where there is no more, and StoreError where the store has not said so for STORE_WAIT_S.
        """
        before = self.covered
        deadline = asyncio.get_running_loop().time() + STORE_WAIT_S
        self._hurry.set()
        while self.covered <= before:
            self.follow()
            if self._task is None:
                raise CreditsEnded
            try:
                async with asyncio.timeout_at(deadline):
                    await self._answered.wait()
            except TimeoutError:
                raise self._store_error or StoreUnavailable("no answer in time") from None
            if self.covered <= before and self._store_error is None:
                raise CreditsEnded

    def close(self) -> None:
        """Ask for nothing more."""
        self._ended = True
        self._reservation.look = None
        if self._task is not None:
            self._task.cancel()

    def _extend_if_low(self) -> None:
        if self._task is None and self._low:
            self._task = asyncio.get_running_loop().create_task(self._extend())

    @property
    def _low(self) -> bool:
        return not self._ended and self.covered < self._wanted + self._slice // 2

    async def _extend(self) -> None:
        pause_s = _PAUSE_FIRST_S
        try:
            while self._low:
                self._hurry.clear()
                before = self.covered
                await self._try_to_extend()
                self._say_answered()
                if self._low:
                    pause_s = _PAUSE_FIRST_S if self.covered > before else min(2 * pause_s, _PAUSE_MOST_S)
                    await self._pause(pause_s)
        finally:
            self._task = None
            self._say_answered()

    async def _pause(self, seconds: float) -> None:
        """Give others the time to end, but no longer than until the stream has nothing left."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _try_to_extend(self) -> None:
        try:
            await self._extend_once()
        except StoreError as error:
            if self._store_error is None:
                log.warning("%s: the hold cannot be extended yet: %s", self._exchange.id, error)
            self._store_error = error
        except EngineError as error:
            log.error("%s: the hold cannot be extended: %s", self._exchange.id, error)
            self._ended = True
        else:
            self._store_error = None

    async def _extend_once(self) -> None:
        reservation = self._reservation
        output = min(self._wanted + self._slice, self._most)
        target_femto = self._fixed_femto + output * self._output_femto
        await self._engine.extend(reservation, target_femto, self._seen())
        self.covered = self._covered_by(reservation.reserved.payg_nano)

    def _say_answered(self) -> None:
        answered, self._answered = self._answered, asyncio.Event()
        answered.set()

    def _covered_by(self, payg_nano: int) -> int:
        price = self._output_femto
        # The upstream's own limit ends a stream that is covered to it: then nothing depends on the count. What a hold
        # at a reduced rate covers is rounded down, which must not cost the last token.
        if not price or (payg_nano + 1) * FEMTO_PER_NANO >= self._fixed_femto + self._most * price:
            return UNLIMITED
        return max(0, payg_nano * FEMTO_PER_NANO - self._fixed_femto) // price

    def _seen(self) -> Seen:
        tokens = self._events.metered(complete=False)
        return Seen(self._model.prices.femto(tokens), note_of(self._exchange, self._model, tokens))
