"""A stand-in for a server of the Realtime API: no real one can be had here. It speaks the protocol on a websocket, in
the test's own loop, and does what the test's items tell it to."""

import asyncio
import base64
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from aiohttp import WSMsgType, web

from tests.upstreams.local import LocalUpstream

WORD = " w"
#: 50 ms of PCM at 24 kHz: one token of speech.
SOUND = base64.b64encode(bytes(2400)).decode()
#: What a response reports unless it is told otherwise.
INPUT_TOKENS = 20


@dataclass
class Told:
    """One session as the upstream saw it. events: what came, in order; closed: with which code it ended."""

    headers: dict[str, str]
    query: dict[str, str]
    socket: web.WebSocketResponse
    events: list[dict[str, Any]] = field(default_factory=list)
    closed: int | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]


class RealtimeUpstream(LocalUpstream):
    """The text of the last item that a client made is JSON, the plan of the response to come: words, sounds: how many
    of each it has, each an event and a token; usage: what it reports, or null; status: how it ends; pause_at: before
    which of them it waits for ``go(name)``; break_at: before which the connection breaks; close_at: before which it is
    closed in an orderly way; done_only: without deltas. A response that is cancelled reports what it has said.

    transcript: the usage of a transcript. With ``server_vad`` each second of audio in the buffer is a turn of speech.
    late: transcripts, and responses to speech, come only after the next commit or response.create was read, as does the
    refusal of a conversation.item.delete, always. A response.create may bring a plan of its own, as metadata.
    refuse: the status of handshakes; silent: they
    are not answered.
    """

    def __init__(self) -> None:
        super().__init__(web.get("/v1/realtime", self._serve))
        self.told: list[Told] = []
        self.refuse: int | None = None
        self.silent = False
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def go(self, name: str) -> None:
        """Let the responses that wait for name go on."""
        self._gates[name].set()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.silent:
            await asyncio.Event().wait()
        if self.refuse:
            error = {"message": "not here", "type": "invalid_request_error", "code": "refused"}
            return web.json_response({"error": error}, status=self.refuse, headers={"Retry-After": "7"})
        socket = web.WebSocketResponse(protocols=("realtime",), timeout=0.5, max_msg_size=2**25)
        await socket.prepare(request)
        told = Told({name.lower(): value for name, value in request.headers.items()}, dict(request.query), socket)
        self.told.append(told)
        try:
            await _Session(told, self._gates, request).run()
        finally:
            told.closed = socket.close_code
            told.over.set()
        return socket


class _Session:
    def __init__(self, told: Told, gates: dict[str, asyncio.Event], request: web.Request) -> None:
        self._told = told
        self._gates = gates
        self._request = request
        self._numbers = count(1)
        self._plan: dict[str, Any] = {}
        self._responses: dict[str, asyncio.Task[None]] = {}
        self._said: dict[str, int] = {}
        self._vad = False
        self._buffer_ms = self._heard_ms = 0
        self._late: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def say(self, kind: str, **members: Any) -> None:
        await self._told.socket.send_json({"type": kind, "event_id": f"event_{next(self._numbers)}", **members})

    async def run(self) -> None:
        session = {
            "type": "realtime",
            "object": "realtime.session",
            "audio": {"input": {"format": {"type": "audio/pcm"}}},
        }
        await self.say("session.created", session=session)
        async for message in self._told.socket:
            assert message.type is WSMsgType.TEXT, message
            event = json.loads(message.data)
            self._told.events.append(event)
            match event["type"]:
                case "session.update":
                    detection = event["session"].get("audio", {}).get("input", {}).get("turn_detection") or {}
                    self._vad = detection.get("type") == "server_vad"
                    await self.say("session.updated", session={**session, **event["session"]})
                case "conversation.item.create":
                    self._read_plan(event["item"])
                    await self.say("conversation.item.added", item=event["item"], previous_item_id=None)
                case "input_audio_buffer.append":
                    await self._hear(len(base64.b64decode(event["audio"])) * 1000 // 48_000)
                case "conversation.item.delete":
                    error = {"type": "invalid_request_error", "message": "no", "event_id": event.get("event_id")}
                    self._late.append(partial(self.say, "error", error=error))
                case "input_audio_buffer.commit":
                    await self._catch_up()
                    await self.say("input_audio_buffer.committed", item_id="item_s", previous_item_id=None)
                    await self._transcribe()
                case "response.create":
                    await self._catch_up()
                    await self._create(event)
                case "response.cancel":
                    self._responses[event["response_id"]].cancel()

    def _read_plan(self, item: dict[str, Any]) -> None:
        parts = item.get("content") or []
        for part in parts:
            if str(part.get("text", "")).startswith("{"):
                self._plan = json.loads(part["text"])

    async def _hear(self, audio_ms: int) -> None:
        self._buffer_ms += audio_ms
        while self._vad and self._buffer_ms - self._heard_ms >= 1000:
            self._heard_ms += 1000
            await self.say("input_audio_buffer.speech_stopped", audio_end_ms=self._heard_ms, item_id="item_s")
            await self.say("input_audio_buffer.committed", item_id="item_s", previous_item_id=None)
            await self._now_or_late(partial(self._respond, {}))

    async def _create(self, event: dict[str, Any]) -> None:
        if self._plan.get("refuse"):
            error = {"type": "invalid_request_error", "message": "no", "event_id": event.get("event_id")}
            await self.say("error", error=error)
            self._plan = {}
        else:
            await self._respond(event.get("response") or {})

    async def _now_or_late(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._plan.get("late"):
            self._late.append(act)
        else:
            await act()

    async def _catch_up(self) -> None:
        late, self._late = self._late, []
        for act in late:
            await act()

    async def _transcribe(self) -> None:
        where = {"item_id": "item_s", "content_index": 0}
        await self.say("conversation.item.input_audio_transcription.delta", **where, delta="hello")
        if "transcript" in self._plan:
            event = {**where, "transcript": "hello", "usage": self._plan["transcript"]}
            kind = "conversation.item.input_audio_transcription.completed"
            await self._now_or_late(partial(self.say, kind, **event))

    async def _respond(self, asked: dict[str, Any]) -> None:
        number = f"resp_{next(self._numbers)}"
        own = json.loads((asked.get("metadata") or {}).get("plan", "null"))
        self._responses[number] = asyncio.create_task(self._answer(number, own or dict(self._plan), asked))
        await asyncio.sleep(0)  # it is said to have begun before anything else is

    async def _answer(self, number: str, plan: dict[str, Any], asked: dict[str, Any]) -> None:
        conversation = None if asked.get("conversation") == "none" else "conv_1"
        response: dict[str, Any] = {"object": "realtime.response", "id": number, "conversation_id": conversation}
        self._said[number] = 0
        status = plan.get("status", "completed")
        try:
            await self._speak(number, plan, response)
        except asyncio.CancelledError:
            status = "cancelled"
        except ConnectionError:
            return
        said = self._said[number]
        usual = {"input_tokens": INPUT_TOKENS, "output_tokens": said, "total_tokens": INPUT_TOKENS + said}
        done = {**response, "status": status, "output": [], "usage": plan.get("usage", usual)}
        await self.say("response.done", response=done)

    async def _speak(self, number: str, plan: dict[str, Any], response: dict[str, Any]) -> None:
        await self.say("response.created", response={**response, "status": "in_progress", "output": []})
        where = {"response_id": number, "item_id": "item_1", "output_index": 0, "content_index": 0}
        texts = [("response.output_text.delta", WORD)] * plan.get("words", 0)
        sounds = [("response.output_audio.delta", SOUND)] * plan.get("sounds", 0)
        for index, (kind, delta) in enumerate([*texts, *sounds]):
            if index == plan.get("pause_at"):
                await self._gates[plan["name"]].wait()
            if index == plan.get("break_at"):
                assert self._request.transport is not None
                self._request.transport.abort()
                raise ConnectionResetError
            if index == plan.get("close_at"):
                await self._told.socket.close(code=plan["code"], message=b"that is all")
                raise ConnectionResetError
            if not plan.get("done_only"):
                await self.say(kind, **where, delta=delta)
            self._said[number] = index + 1
            await asyncio.sleep(0)
        text = WORD * plan.get("words", 0)
        item = {"id": "item_1", "type": "message", "role": "assistant", "content": [{"type": "text", "text": text}]}
        await self.say("response.output_item.done", response_id=number, output_index=0, item=item)
        if "stay" in plan:
            await self._gates[plan["stay"]].wait()
