"""The turns of one realtime session: reserved before anything that can begin a response, charged as responses end."""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gateway.apis.realtime_answers import RealtimeUsage, ServerEvent, read_usage
from gateway.apis.realtime_audio import PCM_BYTES_PER_S
from gateway.apis.realtime_conversation import Conversation, Size
from gateway.apis.realtime_events import ClientEvent
from gateway.credits.errors import StoreError
from gateway.credits.service import Identity
from gateway.domain.decision import Settlement
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import InvalidRequest
from gateway.http.exchange import Exchange
from gateway.http.holding import STORE_WAIT_S, CreditsEnded
from gateway.http.realtime_over import SessionOver
from gateway.http.realtime_turn import Counter, Turn, Use, reserve_turn, use_of
from gateway.upstream.websocket import UpstreamClosed

# Responses at once; each is held for by itself.
_MOST_RESPONSES = 4
# Between two tries to reserve.
_PAUSE_S = 1.0
_NOTHING = Size()


class Turns:
    """spare: a turn that is reserved and has not begun; asked: those that the client asked for; open: those that have
    begun, by the response's id. lock: to be held in all calls; it is notified when a turn ends."""

    def __init__(self, counter: Counter, exchange: Exchange, model: Model, conversation: Conversation) -> None:
        assert exchange.identity is not None
        self.lock = asyncio.Condition()
        self.spare: Turn | None = None
        self.asked: deque[Turn] = deque()
        self.open: dict[str, Turn] = {}
        self._config = exchange.config
        self._identity: Identity = exchange.identity
        self._counter = counter
        self._model = model
        self._upstream = exchange.config.upstreams[model.upstream]
        self._conversation = conversation
        self._output_rate = PCM_BYTES_PER_S
        self._own = _NOTHING
        self._begins_by_itself = False

    @property
    def busy(self) -> bool:
        """Whether a response is asked for or under way."""
        return bool(self.asked or self.open)

    def all(self) -> Iterator[Turn]:
        """All that have not ended."""
        yield from ([self.spare] if self.spare else [])
        yield from self.asked
        yield from self.open.values()

    def take_output_rate(self, bytes_per_second: int) -> None:
        """Count audio by what is the longest of all formats that were asked for."""
        self._output_rate = min(self._output_rate, bytes_per_second)
        for turn in self.all():
            turn.tally.take_rate(self._output_rate)

    def heard(self) -> None:
        """The upstream has heard something, which it may answer by itself."""
        self._begins_by_itself = True

    async def covered_spare(self, own: Size = _NOTHING) -> Turn:
        """A turn that holds for all that the conversation can be by now. While other turns are under way, wait for
        their ends, which may bring what is missing. Raises CreditsEnded, SessionOver and StoreError."""
        while True:
            try:
                size = self._conversation.input_size(own)
                turn = self.spare or await self.reserve(self._model, use_of(self._model, self._upstream, size))
                self.spare = turn
                turn.resize(size)
                await turn.cover(patient=not self.busy)
            except CreditsEnded:
                if not self.busy:
                    raise
                await self.lock.wait()
            else:
                return turn

    async def reserve(self, model: Model, use: Use) -> Turn:
        """A new turn. Raises CreditsEnded while others of the session hold credits, else SessionOver where none are to
        be had, and StoreError."""
        deadline = asyncio.get_running_loop().time() + STORE_WAIT_S
        while True:
            late = asyncio.get_running_loop().time() >= deadline
            try:
                made = await reserve_turn(self._counter, self._config, self._identity, model, use)
            except StoreError:
                if late:
                    raise
            else:
                if isinstance(made, Turn):
                    made.tally.take_rate(self._output_rate)
                    return made
                if self.busy:
                    raise CreditsEnded
                if late or made.failure.code != "credits_in_flight":
                    raise SessionOver(1013 if late else 1008, made.failure)
            await asyncio.sleep(_PAUSE_S)  # the store may be back, or another request of the account have ended

    async def ask(self, event: ClientEvent) -> None:
        """The client asks for a response. Raises InvalidRequest for one too many, and as covered_spare."""
        if len(self.asked) + len(self.open) >= _MOST_RESPONSES:
            raise InvalidRequest(f"no more than {_MOST_RESPONSES} responses may be under way")
        own = self._conversation.size_of(event.own)
        turn = await self.covered_spare(own)
        self.spare, self._own = None, Size(max(own.most, self._own.most))
        # An upstream that refuses says by this id what. It is no client's: that could give it to another event, too.
        turn.client_id = event.document.get("event_id")
        turn.event_id = event.document["event_id"] = f"event_{secrets.token_hex(12)}"
        turn.reach = self._conversation.asked() if event.plain else None
        if self.busy:
            self._cannot_tell()
        self.asked.append(turn)
        turn.begin(turn.use.size)

    async def begun(self, number: str) -> Turn:
        """The turn of a response, which may have begun just now. Raises as covered_spare, and UpstreamClosed."""
        if number in self.open:
            return self.open[number]
        if len(self.open) >= 2 * _MOST_RESPONSES:
            raise UpstreamClosed(1006, "it runs too many responses at once")
        alone = not self.open and len(self.asked) <= 1
        size = self._conversation.input_size()
        if self.asked:
            turn = self.asked.popleft()
            # It may be one that the upstream began by itself, which has heard more than the one that was asked for.
            turn.resize(max(size, turn.use.size, key=lambda one: one.most))
        else:
            turn = self.spare or await self.reserve(self._model, use_of(self._model, self._upstream, size))
            self.spare = None
            turn.begin(size)
            turn.reach = self._conversation.begun()
        if self._begins_by_itself:
            # It may be the one whose turn another has got, with all that was put into it alone.
            most = max(turn.use.size.most, self._conversation.input_size(self._own).most)
            turn.resize(replace(turn.use.size, most=most))
        self.open[number] = turn
        if not alone:
            self._cannot_tell()
        await turn.cover(patient=self._alone)
        return turn

    async def flow(self, event: ServerEvent) -> None:
        """Output comes. Raises as begun where it is not to be handed out."""
        turn = await self.begun(self._number_of(event))
        if not (event.repeats and turn.tally.tokens):
            turn.tally.add(event)
        await turn.cover(patient=self._alone)
        turn.hand_out()

    async def done(self, event: ServerEvent, response: dict[str, Any]) -> Settlement | None:
        """A response has ended: charge it; what that came to, if the store has said so."""
        number = self._number_of(event)
        turn = await self.begun(number)
        usage = read_usage(response)
        try:
            await turn.settle(_billed(turn, response, usage))
        finally:
            del self.open[number]
            self.lock.notify_all()
        turn.learn()
        if usage is not None and turn.reach is not None and _tells_all(response):
            self._conversation.told(usage.total, turn.reach)
        else:
            self._conversation.add_output(usage.output_tokens if usage else turn.tally.tokens)
        return turn.exchange.settlement

    async def refused(self, event_id: str) -> str:
        """The upstream does not do what an event of the client asks for: the event's id as the client knows it."""
        for turn in [one for one in self.all() if one.event_id == event_id]:
            client_id, turn.reach = turn.client_id, None
            if turn not in self.asked:  # it has begun by itself
                return client_id or event_id
            self.asked.remove(turn)
            turn.give_back()
            if self.spare is None:
                self.spare = turn
            else:
                await turn.void()
            self.lock.notify_all()
            return client_id or event_id
        return event_id

    @property
    def _alone(self) -> bool:
        """Whether no other response of the session is to go on meanwhile."""
        return len(self.asked) + len(self.open) <= 1

    def _number_of(self, event: ServerEvent) -> str:
        """The id of the event's response; where it does not say so, of the one that is open."""
        return event.response_id or next(iter(self.open), "")

    def _cannot_tell(self) -> None:
        """Of responses beside each other, it is not known which of them got what."""
        for turn in (*self.asked, *self.open.values()):
            turn.reach = None


def _tells_all(response: dict[str, Any]) -> bool:
    """Whether the usage of a response is that of the whole conversation: it came to its end, and is a part of it."""
    return response.get("status") in ("completed", "incomplete") and response.get("conversation_id", "") is not None


def _billed(turn: Turn, response: dict[str, Any], usage: RealtimeUsage | None) -> Metered:
    """What is charged for a response that ended; one that failed and tells no usage costs nothing."""
    if usage is not None:
        return turn.usage_billed(usage)
    return Metered() if response.get("status") == "failed" else turn.counted_billed()
