"""GET /realtime: a websocket for talks in words and sound. Nobody listens, so each turn is asked for by the client."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from gateway.demo.conversation import (
    MAX_SOUND_BYTES,
    Conversation,
    Item,
    Settings,
    item_of,
    sound_bytes_of,
    spoken_item,
)
from gateway.demo.fields import Body, check_model, objects
from gateway.demo.realtime_response import RealtimeResponse
from gateway.demo.refusal import Refused, error_of

#: Of one event: 15 MiB of sound are 20 MiB of base64.
MAX_EVENT_BYTES = 21 * 1024 * 1024

SOCKETS: web.AppKey[WeakSet[web.WebSocketResponse]] = web.AppKey("sockets", WeakSet)

_HEARTBEAT_SECONDS = 30


async def talk(request: web.Request) -> web.WebSocketResponse:
    """A session with one conversation, until the client leaves."""
    model = check_model(request, request.query.get("model"))
    socket = web.WebSocketResponse(
        protocols=("realtime",), max_msg_size=MAX_EVENT_BYTES, heartbeat=_HEARTBEAT_SECONDS, compress=False
    )
    if not socket.can_prepare(request):
        raise Refused("/realtime is a websocket", status=426)
    await socket.prepare(request)
    request.app[SOCKETS].add(socket)
    session = _Session(socket, model)
    try:
        await session.run()
    finally:
        await session.end()
    return socket


async def close_sockets(app: web.Application) -> None:
    """Tell the clients that are connected that the server goes away."""
    sockets = app[SOCKETS]
    for socket in list(sockets):
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the demo model stops")


class _Session:
    def __init__(self, socket: web.WebSocketResponse, model: str) -> None:
        self._socket = socket
        self._model = model
        self._settings = Settings()
        self._conversation = Conversation()
        self._sound_bytes = 0
        self._numbers = 0
        self._response: RealtimeResponse | None = None
        self._saying: asyncio.Task[None] | None = None
        self._answers: dict[str, Callable[[Body], Awaitable[None]]] = {
            "session.update": self._update,
            "conversation.item.create": self._create_item,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.clear": self._clear,
            "input_audio_buffer.commit": self._commit,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    async def run(self) -> None:
        """Answer the client's events as they come."""
        with suppress(ConnectionResetError):  # the client has left; there is nobody to tell
            await self._send("session.created", session=self._settings.session(self._model))
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._hear(message.data)
                else:
                    await self._refuse(Refused("an event must be a text message"), None)

    async def end(self) -> None:
        """Say nothing more."""
        if self._saying is not None:
            self._saying.cancel()
            with suppress(asyncio.CancelledError):
                await self._saying

    async def _hear(self, data: str) -> None:
        event_id = None
        try:
            event = _event_of(data)
            event_id = event.get("event_id")
            answer = self._answers.get(str(event.get("type")))
            if answer is None:
                raise Refused(f"the demo model knows no event {event.get('type')!r}", "type", code="invalid_value")
            await answer(event)
        except Refused as refused:
            await self._refuse(refused, event_id)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": self._new_id("event"), **fields}
        await self._socket.send_str(orjson.dumps(event).decode())

    async def _refuse(self, refused: Refused, event_id: object) -> None:
        await self._send("error", error={**error_of(refused), "event_id": event_id})

    def _new_id(self, prefix: str) -> str:
        self._numbers += 1
        return f"{prefix}_demo_{self._numbers}"

    async def _update(self, event: Body) -> None:
        given = _object(event, "session")
        if given.get("type", "realtime") != "realtime":
            raise Refused("the demo model has only sessions of type realtime", "session.type")
        self._settings = self._settings.changed_by(given)
        await self._send("session.updated", session=self._settings.session(self._model))

    async def _create_item(self, event: Body) -> None:
        if event.get("previous_item_id") not in (None, self._conversation.last_id):
            raise Refused("the demo model puts items only at the end", "previous_item_id")
        await self._add(item_of(event.get("item"), self._new_id("item")))

    async def _add(self, item: Item) -> None:
        before = self._conversation.last_id
        self._conversation.add(item)
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self._send(kind, previous_item_id=before, item=item.shown)

    async def _append(self, event: Body) -> None:
        size = sound_bytes_of(event.get("audio"), "audio")
        if self._sound_bytes + size > MAX_SOUND_BYTES:
            raise Refused(f"the sound must have at most {MAX_SOUND_BYTES} bytes", "audio")
        self._sound_bytes += size

    async def _clear(self, _event: Body) -> None:
        self._sound_bytes = 0
        await self._send("input_audio_buffer.cleared")

    async def _commit(self, _event: Body) -> None:
        if not self._sound_bytes:
            raise Refused("no sound has come", code="input_audio_buffer_commit_empty")
        item = spoken_item(self._sound_bytes, self._new_id("item"))
        before = self._conversation.last_id
        await self._send("input_audio_buffer.committed", previous_item_id=before, item_id=item.id)
        self._sound_bytes = 0
        await self._add(item)

    async def _create_response(self, event: Body) -> None:
        if self._saying is not None and not self._saying.done():
            raise Refused("an answer is being given already", code="conversation_already_has_active_response")
        given = _object(event, "response")
        if given.get("conversation", "auto") not in ("auto", "none"):
            raise Refused("conversation must be auto or none", "response.conversation")
        heard = self._conversation
        if given.get("input") is not None:
            heard = Conversation()
            for item in objects(given, "input", 1000):
                heard.add(item_of(item, self._new_id("item")))
        response = RealtimeResponse(
            self._new_id("resp"),
            self._new_id("item"),
            self._settings.changed_by(given),
            heard,
            None if given.get("conversation") == "none" else self._conversation,
            given.get("metadata"),
        )
        response.take_place()
        self._response = response
        self._saying = asyncio.create_task(self._say(response))

    async def _say(self, response: RealtimeResponse) -> None:
        with suppress(ConnectionResetError):  # the client has left
            await response.say(self._send)

    async def _cancel_response(self, _event: Body) -> None:
        if self._response is None or self._saying is None or self._saying.done():
            raise Refused("no answer is being given", code="response_cancel_not_active")
        self._response.stopped.set()


def _event_of(data: str) -> Body:
    try:
        event = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Refused(f"the event is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise Refused("the event must be a JSON object")
    return event


def _object(event: Body, name: str) -> Body:
    value = event.get(name, {})
    if not isinstance(value, dict):
        raise Refused(f"{name} must be an object", name)
    return value
