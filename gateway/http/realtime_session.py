"""One session of the realtime websocket: what goes either way, in order, as far as credits go.

Each frame is read, accounted for, and written before the next one of its direction is read. Accounting is done under
one lock: settling a turn and reserving the next has neither side go on meanwhile.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterator

import orjson
from aiohttp import WSMsgType, web

from gateway.apis.realtime_answers import RealtimeUsage, ServerEvent, part_of, read_server_event, read_usage
from gateway.apis.realtime_audio import PCM_BYTES_PER_S, UNKNOWN_BYTES_PER_S, bytes_per_second
from gateway.apis.realtime_conversation import Conversation, Size
from gateway.apis.realtime_events import ClientEvent, Content, NotAnEvent, read_client_event, read_document
from gateway.credits.errors import StoreError
from gateway.credits.service import Identity
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import InvalidRequest
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange, cost_fields
from gateway.http.holding import STORE_WAIT_S, CreditsEnded
from gateway.http.realtime_over import ClientLeft, SessionOver
from gateway.http.realtime_turn import Counter, Turn, reserve_turn
from gateway.upstream.websocket import UpstreamClosed, UpstreamSocket

log = logging.getLogger(__name__)

# Responses at once; each is held for by itself.
_MOST_RESPONSES = 4
_CLIENT_STALL_S = 60.0
_PAUSE_S = 1.0


class Session:
    """spare: a turn that is reserved and has not begun; asked: those that the client asked for; open: those that have
    begun, by the response's id. moved: when a frame came last, by the loop's clock. unread: an event of the upstream's
    that is not accounted for yet."""

    def __init__(
        self,
        counter: Counter,
        exchange: Exchange,
        model: Model,
        conversation: Conversation,
        client: web.WebSocketResponse,
        upstream: UpstreamSocket,
    ) -> None:
        assert exchange.identity is not None
        self.exchange = exchange
        self.upstream = upstream
        self.client = client
        self.lock = asyncio.Condition()
        self.spare: Turn | None = None
        self.asked: deque[Turn] = deque()
        self.open: dict[str, Turn] = {}
        self.moved = asyncio.get_running_loop().time()
        self.unread: str | None = None
        self._identity: Identity = exchange.identity
        self._counter = counter
        self._model = model
        self._conversation = conversation
        self._allowed = exchange.config.upstreams[model.upstream].allow_fields
        self._output_rate = PCM_BYTES_PER_S
        self._answers_silence = False

    @property
    def busy(self) -> bool:
        """Whether a response is asked for or under way."""
        return bool(self.asked or self.open)

    def turns(self) -> Iterator[Turn]:
        """All that have not ended."""
        yield from ([self.spare] if self.spare else [])
        yield from self.asked
        yield from self.open.values()

    # --- from the client ----------------------------------------------------------------------------------------

    async def pass_client(self) -> None:
        """Pass on what the client says. Raises SessionOver, CreditsEnded, StoreError and UpstreamClosed."""
        while True:
            message = await self.client.receive()
            self.moved = asyncio.get_running_loop().time()
            if message.type is WSMsgType.BINARY:
                raise SessionOver(1003, errors.invalid_event("invalid_event", "events are text, not binary"))
            if message.type is not WSMsgType.TEXT:
                raise ClientLeft
            try:
                document = read_document(message.data)
            except NotAnEvent as error:
                raise SessionOver(1007, errors.invalid_event("invalid_event", str(error))) from error
            try:
                event = read_client_event(document, self._model.name, self._allowed)
                async with self.lock:
                    await self._admit(event)
                forwarded = orjson.dumps(event.document).decode()
            except orjson.JSONEncodeError:
                raise SessionOver(1007, errors.invalid_event("invalid_event", "it is nested too deeply")) from None
            except InvalidRequest as error:
                await self.tell(errors.invalid_event("unsupported", str(error), error.param), document.get("event_id"))
            else:
                await self.upstream.write(forwarded)

    async def tell(self, failure: Failure, event_id: object = None) -> None:
        """Send the client an error event. Raises SessionOver where it does not read."""
        await self._send(orjson.dumps(errors.realtime_event(failure, event_id)).decode())

    async def _send(self, text: str) -> None:
        try:
            async with asyncio.timeout(_CLIENT_STALL_S):
                await self.client.send_str(text)
        except (TimeoutError, ConnectionError):
            raise ClientLeft from None

    async def _admit(self, event: ClientEvent) -> None:
        """Have what an event can cost held before it is forwarded. Raises InvalidRequest for one too many."""
        if event.input_rate is not None:
            self._conversation.take_input_rate(event.input_rate)
        if event.output_rate is not None:
            self._take_output_rate(event.output_rate)
        self._answers_silence |= event.answers_silence
        if event.kind == "input_audio_buffer.append":
            self._conversation.add_audio(event.content.audio_bytes)
        elif event.kind == "input_audio_buffer.commit":
            self._conversation.commit()
        elif event.content:
            self._conversation.add(event.content)
        if event.kind == "response.create":
            await self._ask(event)
        elif event.content or event.kind == "session.update":
            await self._covered_spare(Size())

    async def _ask(self, event: ClientEvent) -> None:
        if len(self.asked) + len(self.open) >= _MOST_RESPONSES:
            raise InvalidRequest(f"no more than {_MOST_RESPONSES} responses may be under way")
        turn = await self._covered_spare(self._conversation.size_of(event.own))
        self.spare = None
        # An upstream that refuses says by this id what.
        turn.event_id = event.document["event_id"] = event.document.get("event_id") or f"event_{secrets.token_hex(12)}"
        turn.reach = self._conversation.asked() if event.plain else None
        if self.busy:
            self._cannot_tell()
        self.asked.append(turn)
        turn.begin(turn.size)

    async def _covered_spare(self, own: Size) -> Turn:
        """A turn that holds for all that the conversation can be by now. While other turns are under way, wait for
        their ends, which may bring what is missing."""
        while True:
            try:
                turn = self.spare or await self._reserve(own)
                self.spare = turn
                turn.size = self._conversation.input_size(own)
                await turn.cover()
            except CreditsEnded:
                if not self.busy:
                    raise
                await self.lock.wait()
            else:
                return turn

    async def _reserve(self, own: Size) -> Turn:
        """A new turn. Raises CreditsEnded while others of the session hold credits, else SessionOver where none are to
        be had, and StoreError."""
        deadline = asyncio.get_running_loop().time() + STORE_WAIT_S
        while True:
            late = asyncio.get_running_loop().time() >= deadline
            size = self._conversation.input_size(own)
            try:
                made = await reserve_turn(self._counter, self.exchange.config, self._identity, self._model, size)
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

    # --- from the upstream --------------------------------------------------------------------------------------

    async def pass_upstream(self) -> None:
        """Pass on what the upstream says. Raises SessionOver, CreditsEnded, StoreError and UpstreamClosed."""
        while True:
            raw = await self.upstream.read()
            self.moved = asyncio.get_running_loop().time()
            event = read_server_event(raw)
            if event is None:
                raise UpstreamClosed(1006, "it sent something that is no event")
            self.unread = raw
            async with self.lock:
                raw = await self._account(event, raw)
                self.unread = None
            await self._send(raw)
            if event.kind == "response.done" and self._answers_silence:
                async with self.lock:
                    if not self.busy:
                        await self._covered_spare(Size())

    async def _account(self, event: ServerEvent, raw: str) -> str:
        """Have what an event brings held or charged, and what the client is to get of it."""
        match event.kind:
            case "response.created":
                await self._begun(self._id_of(event))
            case "response.done":
                return await self._done(event)
            case "session.created" | "session.updated":
                self._take_session(event)
            case "input_audio_buffer.speech_stopped":
                end_ms = event.document.get("audio_end_ms")
                self._conversation.heard(end_ms if type(end_ms) is int else 0)
            case "error" if event.refused:
                await self._take_refusal(event.refused)
        if event.has_output:
            turn = await self._begun(self._id_of(event))
            if not (event.repeats and turn.tally.tokens):
                turn.tally.add(event)
            await turn.cover()
            turn.hand_out()
        return raw

    def _id_of(self, event: ServerEvent) -> str:
        """Of the event's response; where it does not say so, of the one that is open."""
        return event.response_id or next(iter(self.open), "")

    async def _begun(self, response_id: str) -> Turn:
        """The turn of a response, which may have begun just now."""
        if response_id in self.open:
            return self.open[response_id]
        if len(self.open) >= 2 * _MOST_RESPONSES:
            raise UpstreamClosed(1006, "it runs too many responses at once")
        alone = not self.open and len(self.asked) <= 1
        if self.asked:
            turn = self.asked.popleft()
        else:
            turn, self.spare = self.spare or await self._reserve(Size()), None
            turn.begin(self._conversation.input_size())
            turn.reach = self._conversation.begun()
        self.open[response_id] = turn
        if not alone:
            self._cannot_tell()
        await turn.cover()
        return turn

    async def _done(self, event: ServerEvent) -> str:
        response, number = part_of(event.document, "response"), self._id_of(event)
        turn = await self._begun(number)
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
        if fields := cost_fields(turn.exchange.settlement):
            response["usage"] = {**part_of(response, "usage"), **fields}
        return orjson.dumps(event.document).decode()

    def _cannot_tell(self) -> None:
        """Of responses beside each other, it is not known which of them got what."""
        for turn in (*self.asked, *self.open.values()):
            turn.reach = None

    async def _take_refusal(self, event_id: str) -> None:
        """The upstream does not do what an event of the client asks for."""
        for turn in self.open.values():
            if turn.event_id == event_id:  # this one has begun by itself
                turn.reach = None
        for turn in [one for one in self.asked if one.event_id == event_id]:
            self.asked.remove(turn)
            turn.give_back()
            if self.spare is None:
                self.spare = turn
            else:
                await turn.void()
            self.lock.notify_all()

    def _take_session(self, event: ServerEvent) -> None:
        session = part_of(event.document, "session")
        audio = part_of(session, "audio")
        given = part_of(audio, "input").get("format") or session.get("input_audio_format")
        made = part_of(audio, "output").get("format") or session.get("output_audio_format")
        if given:
            self._conversation.take_input_rate(bytes_per_second(given) or UNKNOWN_BYTES_PER_S)
        if made:
            self._take_output_rate(bytes_per_second(made) or UNKNOWN_BYTES_PER_S)
        if event.kind == "session.created":  # what the upstream says to its model before the client says anything
            said = [session[name] for name in ("instructions", "tools") if session.get(name)]
            self._conversation.add(Content(len(orjson.dumps(said)) if said else 0))

    def _take_output_rate(self, rate: int) -> None:
        self._output_rate = min(self._output_rate, rate)
        for turn in self.turns():
            turn.tally.take_rate(self._output_rate)


def _tells_all(response: dict[str, object]) -> bool:
    """Whether the usage of a response is that of the whole conversation: it came to its end, and is a part of it."""
    return response.get("status") in ("completed", "incomplete") and response.get("conversation_id", "") is not None


def _billed(turn: Turn, response: dict[str, object], usage: RealtimeUsage | None) -> Metered:
    """What is charged for a response that ended; one that failed and tells no usage costs nothing."""
    if usage is not None:
        return turn.usage_billed(usage)
    return Metered() if response.get("status") == "failed" else turn.counted_billed()
