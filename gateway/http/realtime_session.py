"""One session of the realtime websocket: what goes either way, in order, as far as credits go.

Each frame is read, accounted for, and written before the next one of its direction is read. Accounting is done under
one lock: settling a turn and reserving the next has neither side go on meanwhile.
"""

import asyncio

import orjson
from aiohttp import WSMsgType, web

from gateway.apis.realtime_answers import ServerEvent, part_of, read_server_event
from gateway.apis.realtime_audio import UNKNOWN_BYTES_PER_S, bytes_per_second
from gateway.apis.realtime_conversation import Conversation
from gateway.apis.realtime_events import (
    TRANSCRIPTION,
    ClientEvent,
    Content,
    NotAnEvent,
    read_client_event,
    read_document,
)
from gateway.domain.decision import Settlement
from gateway.domain.model import Model
from gateway.domain.request import InvalidRequest
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange, cost_fields
from gateway.http.realtime_over import ClientLeft, SessionOver
from gateway.http.realtime_scribe import Scribe
from gateway.http.realtime_turns import Turns
from gateway.upstream.websocket import UpstreamClosed, UpstreamSocket

_CLIENT_STALL_S = 60.0
_NOTHING_TO_COMMIT = "input_audio_buffer_commit_empty"
_TRANSCRIPTION = "conversation.item.input_audio_transcription."


class Session:
    """moved: when a frame came last, by the loop's clock. unread: an event of the upstream's that is not accounted for
    yet."""

    def __init__(
        self,
        exchange: Exchange,
        model: Model,
        conversation: Conversation,
        turns: Turns,
        client: web.WebSocketResponse,
        upstream: UpstreamSocket,
    ) -> None:
        self.exchange = exchange
        self.upstream = upstream
        self.client = client
        self.turns = turns
        self.scribe: Scribe | None = None
        self.moved = asyncio.get_running_loop().time()
        self.unread: str | None = None
        self._model = model
        self._conversation = conversation
        self._allowed = exchange.config.upstreams[model.upstream].allow_fields
        self._answers_silence = False

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
                async with self.turns.lock:
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
        """Have what an event can cost held before it is forwarded. Raises InvalidRequest where it is not to be."""
        self._take_transcription(event)
        if event.input_rate is not None:
            self._conversation.take_input_rate(event.input_rate)
        if event.output_rate is not None:
            self.turns.take_output_rate(event.output_rate)
        if event.answers_silence:
            self._answers_silence = True
            self.turns.heard()
        if event.kind == "input_audio_buffer.append":
            self._conversation.add_audio(event.content.audio_bytes)
        elif event.kind == "input_audio_buffer.commit":
            self._conversation.commit()
            if self.scribe is not None:
                self.scribe.commits()
        elif event.content:
            self._conversation.add(event.content)
        if event.kind == "response.create":
            await self.turns.ask(event)
        elif event.content or event.kind == "session.update":
            await self.turns.covered_spare()
        if self.scribe is not None:
            await self.scribe.cover()

    def _take_transcription(self, event: ClientEvent) -> None:
        """Have the model that transcribes paid, too. Raises InvalidRequest for one that has no price."""
        if self.scribe is not None and not event.transcribes:
            self.scribe.stop()
        if event.transcription is None:
            return
        name = event.transcription["model"]
        model = self.exchange.config.models.get(name)
        if model is None or model.upstream != self._model.upstream or not _transcribes(model):
            raise InvalidRequest(f"the model {name[:64]!r} has no price for transcription here", TRANSCRIPTION)
        size = len(orjson.dumps(event.transcription))
        event.transcription["model"] = model.sent_as or name
        if self.scribe is None:
            self.scribe = Scribe(self.turns, model, size, self._conversation)
        elif self.scribe.model is not model:
            raise InvalidRequest("the model that transcribes cannot be changed within a session", TRANSCRIPTION)
        else:
            self.scribe.go_on(size)

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
            async with self.turns.lock:
                settlement = await self._account(event)
                self.unread = None
            await self._send(_with_cost(event, settlement) if settlement else _as_client_wrote(event, raw))
            async with self.turns.lock:
                if event.kind == "response.done" and self._answers_silence and not self.turns.busy:
                    await self.turns.covered_spare()
                if event.kind == f"{_TRANSCRIPTION}completed" and self.scribe is not None:
                    await self.scribe.cover()

    async def _account(self, event: ServerEvent) -> Settlement | None:
        """Have what an event brings held or charged before the client gets it; what was charged."""
        match event.kind:
            case "response.created":
                await self.turns.begun(event.response_id)
            case "response.done":
                return await self.turns.done(event, part_of(event.document, "response"))
            case "session.created" | "session.updated":
                self._take_session(event)
            case "input_audio_buffer.speech_stopped":
                self.turns.heard()
                end_ms = event.document.get("audio_end_ms")
                self._conversation.heard(end_ms if type(end_ms) is int else 0)
            case "error" if event.refused:
                part_of(event.document, "error")["event_id"] = await self.turns.refused(event.refused)
        if event.has_output:
            await self.turns.flow(event)
        return await self._transcribed(event) if self.scribe is not None else None

    async def _transcribed(self, event: ServerEvent) -> Settlement | None:
        scribe = self.scribe
        assert scribe is not None
        match event.kind.removeprefix(_TRANSCRIPTION):
            case "input_audio_buffer.speech_stopped":
                scribe.commits()
            case "input_audio_buffer.committed":
                scribe.committed()
            case "error" if part_of(event.document, "error").get("code") == _NOTHING_TO_COMMIT:
                scribe.commits(-1)
            case "delta" | "segment":
                scribe.show()
            case "completed":
                return await scribe.completed(event)
            case "failed":
                scribe.over()
        return None

    def _take_session(self, event: ServerEvent) -> None:
        session = part_of(event.document, "session")
        audio = part_of(session, "audio")
        given = part_of(audio, "input").get("format") or session.get("input_audio_format")
        made = part_of(audio, "output").get("format") or session.get("output_audio_format")
        if given:
            self._conversation.take_input_rate(bytes_per_second(given) or UNKNOWN_BYTES_PER_S)
        if made:
            self.turns.take_output_rate(bytes_per_second(made) or UNKNOWN_BYTES_PER_S)
        if event.kind == "session.created":  # what the upstream says to its model before the client says anything
            said = [session[name] for name in ("instructions", "tools") if session.get(name)]
            self._conversation.add(Content(len(orjson.dumps(said)) if said else 0))


def _transcribes(model: Model) -> bool:
    """Whether the model has a price for what it hears."""
    return model.prices.tokens is not None or model.prices.audio_ms_femto is not None


def _as_client_wrote(event: ServerEvent, raw: str) -> str:
    """An event that came as raw; the event of the client that an error names is called there as the client does."""
    named = part_of(event.document, "error").get("event_id") if event.refused else event.refused
    return raw if named == event.refused else orjson.dumps(event.document).decode()


def _with_cost(event: ServerEvent, settlement: Settlement) -> str:
    """The event that tells a usage, with what it cost."""
    place = part_of(event.document, "response") if event.kind == "response.done" else event.document
    place["usage"] = {**part_of(place, "usage"), **(cost_fields(settlement) or {})}
    return orjson.dumps(event.document).decode()
