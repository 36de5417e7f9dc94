"""What a realtime session holds: its settings, what was said, and the sound that has come so far."""

import binascii
from base64 import b64decode
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.demo.fields import Body, objects, text
from gateway.demo.refusal import Refused
from gateway.demo.sound import RATE, SAMPLE_BYTES
from gateway.demo.words import count_tokens

MAX_ITEMS = 1000
MAX_PARTS = 100
MAX_OUTPUT_TOKENS = 4096
MAX_SOUND_BYTES = 32 * 1024 * 1024

_BYTES_PER_SECOND = RATE * SAMPLE_BYTES
_INPUT_TOKENS_PER_SECOND = 10
_FORMAT = {"type": "audio/pcm", "rate": RATE}
_ROLES = ("user", "system", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text")
# Items that are no messages: where their text is.
_TEXT_OF = {"function_call": "arguments", "function_call_output": "output"}


@dataclass(frozen=True, slots=True)
class Settings:
    """modality: "audio" or "text". limit: of output tokens; None: no limit."""

    modality: str = "audio"
    instructions: str = ""
    limit: int | None = None

    def changed_by(self, given: Body) -> "Settings":
        """The settings with those given. Raises Refused for what the demo model cannot do."""
        modalities = given.get("output_modalities")
        if modalities not in (None, ["audio"], ["text"]):
            raise Refused('output_modalities must be ["audio"] or ["text"]', "output_modalities")
        limit = given.get("max_output_tokens", self.limit)
        if limit not in (None, "inf") and (type(limit) is not int or not 1 <= limit <= MAX_OUTPUT_TOKENS):
            raise Refused(f'max_output_tokens must be 1 to {MAX_OUTPUT_TOKENS}, or "inf"', "max_output_tokens")
        _check_audio(given)
        instructions = text(given, "instructions")
        return replace(
            self,
            modality=modalities[0] if modalities else self.modality,
            instructions=self.instructions if instructions is None else instructions,
            limit=None if limit == "inf" else limit,
        )

    def document(self) -> dict[str, Any]:
        """As sessions and responses show them."""
        return {"output_modalities": [self.modality], "max_output_tokens": self.limit or "inf"}

    def session(self, model: str) -> dict[str, Any]:
        """The whole session."""
        sound = {"input": {"format": _FORMAT, "turn_detection": None}, "output": {"format": _FORMAT, "voice": "alloy"}}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": "sess_demo",
            "model": model,
            "instructions": self.instructions,
            "tools": [],
            "tool_choice": "auto",
            "audio": sound,
            **self.document(),
        }


@dataclass(frozen=True, slots=True)
class Item:
    """shown: as events show it, without its sound. asked: what an answer echoes, if the user said it."""

    shown: Body
    text_tokens: int
    audio_tokens: int = 0
    asked: str | None = None

    @property
    def id(self) -> str:
        """The client's, or ours."""
        return str(self.shown["id"])


@dataclass(slots=True)
class Conversation:
    """The items that answers are given to. asked: what the user said last."""

    ids: list[str] = field(default_factory=list)
    text_tokens: int = 0
    audio_tokens: int = 0
    asked: str = ""

    @property
    def last_id(self) -> str | None:
        """Of the item at the end."""
        return self.ids[-1] if self.ids else None

    def add(self, item: Item) -> None:
        """Put it at the end. Raises Refused at MAX_ITEMS."""
        if len(self.ids) >= MAX_ITEMS:
            raise Refused(f"a conversation has at most {MAX_ITEMS} items", "item")
        if item.id in self.ids:
            raise Refused(f"there is an item {item.id!r} already", "item.id")
        self.ids.append(item.id)
        self.text_tokens += item.text_tokens
        self.audio_tokens += item.audio_tokens
        if item.asked is not None:
            self.asked = item.asked

    def grow(self, text_tokens: int, audio_tokens: int) -> None:
        """Count what was said of an item that was added before it was said."""
        self.text_tokens += text_tokens
        self.audio_tokens += audio_tokens


def item_of(given: object, new_id: str) -> Item:
    """The item in a client's event. new_id: its id where it has none. Raises Refused."""
    if not isinstance(given, dict):
        raise Refused("item must be an object", "item")
    shown = {"object": "realtime.item", "status": "completed", **given, "id": text(given, "id") or new_id}
    kind = str(given.get("type"))
    if kind in _TEXT_OF:
        return Item(shown, count_tokens(text(given, _TEXT_OF[kind]) or ""))
    if kind != "message" or given.get("role") not in _ROLES:
        raise Refused("an item must be a message, a function_call or a function_call_output", "item.type")
    parts = [_part(part) for part in objects(given, "content", MAX_PARTS)]
    said = "".join(said for said, _, _ in parts)
    sound = sum(size for _, size, _ in parts)
    asked = said or spoken(sound)
    shown["content"] = [part for _, _, part in parts]
    return Item(shown, count_tokens(said), sound_tokens(sound), asked if given["role"] == "user" else None)


def spoken_item(sound_bytes: int, new_id: str) -> Item:
    """The user's item for the sound that has come."""
    part = {"type": "input_audio", "transcript": None}
    shown = {"id": new_id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
    return Item({**shown, "content": [part]}, 0, sound_tokens(sound_bytes), spoken(sound_bytes))


def sound_bytes_of(encoded: object, param: str) -> int:
    """How many bytes a piece of sound has that came as base64. Raises Refused."""
    try:
        return len(b64decode(encoded if isinstance(encoded, str) else "!", validate=True))
    except (binascii.Error, ValueError):
        raise Refused("sound must be base64", param) from None


def sound_tokens(sound_bytes: int) -> int:
    """What sound from the client counts."""
    return -(-sound_bytes * _INPUT_TOKENS_PER_SECOND // _BYTES_PER_SECOND)


def spoken(sound_bytes: int) -> str:
    """What an answer echoes of sound."""
    return f"{sound_bytes / _BYTES_PER_SECOND:.2f} seconds of sound" if sound_bytes else ""


def _part(part: Body) -> tuple[str, int, Body]:
    """Its text, the bytes of its sound, and how it is shown."""
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return text(part, "text") or "", 0, part
    if kind != "input_audio":
        raise Refused(f"the demo model reads no {kind}", "item.content")
    return "", sound_bytes_of(part.get("audio"), "item.content"), {"type": kind, "transcript": part.get("transcript")}


def _check_audio(given: Body) -> None:
    for where in ("input", "output"):
        audio = given.get("audio")
        sound = audio.get(where) if isinstance(audio, dict) else None
        if not isinstance(sound, dict):
            continue
        if sound.get("format") not in (None, _FORMAT, {"type": "audio/pcm"}):
            raise Refused(f"the demo model's only format is audio/pcm at {RATE} Hz", f"audio.{where}.format")
        for name in ("turn_detection", "transcription"):
            if sound.get(name) is not None:
                raise Refused(f"the demo model has no {name}: it must be null", f"audio.{where}.{name}")
