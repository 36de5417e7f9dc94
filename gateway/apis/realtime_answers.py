"""What the upstream says on the realtime websocket: output while it flows, and the usage at a response's end."""

from dataclasses import field
from math import ceil
from typing import Any

import orjson

from gateway.apis.realtime_audio import PCM_BYTES_PER_S, decoded_bytes, duration_ms, most_tokens
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.value import value
from gateway.upstream.count import OutputCount
from gateway.upstream.usage import count

_MOST_SECONDS = 10**6


@value(frozen=True, slots=True)
class ServerEvent:
    """An event of the upstream's. text and audio_bytes: the output in it; response_id: whose it is, empty for none's.
    refused: the client's event that an error is about, empty for none. repeats: the output was in other events before,
    where the upstream sends those."""

    kind: str
    document: dict[str, Any] = field(repr=False)
    response_id: str = ""
    text: str = ""
    audio_bytes: int = 0
    refused: str = ""
    repeats: bool = False

    @property
    def has_output(self) -> bool:
        """Whether there is output in it."""
        return bool(self.text or self.audio_bytes)


def read_server_event(raw: str) -> ServerEvent | None:
    """What an upstream's event means for the cost; None for what is no event."""
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or not isinstance(document.get("type"), str):
        return None
    kind = document["type"]
    if kind in ("response.created", "response.done"):
        return ServerEvent(kind, document, _id(part_of(document, "response").get("id")))
    if kind.startswith("response.") and kind.endswith(".delta"):
        return _delta(kind, document)
    if kind.startswith("response.") and kind.endswith(".done"):
        return ServerEvent(kind, document, _id(document.get("response_id")), text=_said_in(document), repeats=True)
    refused = _id(part_of(document, "error").get("event_id")) if kind == "error" else ""
    return ServerEvent(kind, document, refused=refused)


def part_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a document; empty where there is none."""
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def _id(value: object) -> str:
    return value if isinstance(value, str) else ""


def _said_in(document: dict[str, Any]) -> str:
    """The text of an event that sums up what was said before: on its top level, in a part, or in an item."""
    item = part_of(document, "item")
    content = item.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    places = (document, part_of(document, "part"), item, *parts)
    said = (place.get(name) for place in places for name in ("text", "transcript", "arguments"))
    return "".join(text for text in said if isinstance(text, str))


def _delta(kind: str, document: dict[str, Any]) -> ServerEvent:
    delta, response = document.get("delta"), _id(document.get("response_id"))
    if not isinstance(delta, str):
        delta = orjson.dumps(delta).decode() if delta else ""
    if kind.endswith("audio.delta"):
        return ServerEvent(kind, document, response, audio_bytes=decoded_bytes(delta))
    return ServerEvent(kind, document, response, text=delta)


class OutputTally:
    """Counts the output tokens of one response while it flows. rule: how text is counted; a token of speech is 50 ms of
    audio."""

    def __init__(self, rule: CountOutput) -> None:
        self._text = OutputCount(rule)
        self._audio_ms = 0
        self._rate = PCM_BYTES_PER_S

    def take_rate(self, bytes_per_second: int) -> None:
        """Count audio by what is the longest of all formats that were asked for."""
        self._rate = min(self._rate, bytes_per_second)

    def add(self, event: ServerEvent) -> None:
        """Count what an event holds."""
        if event.text:
            self._text.add([orjson.dumps(event.text)[1:-1]])
        self._audio_ms += duration_ms(event.audio_bytes, self._rate)

    @property
    def tokens(self) -> int:
        """What must be held for."""
        return self._text.tokens + self.audio_tokens

    @property
    def billable(self) -> int:
        """What is charged where no usage says what it was."""
        return self._text.billable + self.audio_tokens

    @property
    def audio_tokens(self) -> int:
        """The spoken part of both."""
        return most_tokens(self._audio_ms)


@value(frozen=True, slots=True)
class RealtimeUsage:
    """What a response used, as the upstream says, each ≥ 0 but otherwise unchecked."""

    input_tokens: int
    output_tokens: int
    cached: int
    fresh_audio: int
    fresh_images: int
    spoken: int
    reasoning: int

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens

    def billed(self, input_most: int, output_most: int) -> Metered:
        """The tokens to charge: never above the bound. Of parts that do not fit into the whole, the last are cut."""
        given, made = min(self.input_tokens, input_most), min(self.output_tokens, output_most)
        cached = min(self.cached, given)
        audio = min(self.fresh_audio, given - cached)
        spoken = min(self.spoken, made)
        return Metered(
            input=given,
            output=made,
            cache_read=cached,
            audio_input=audio,
            image_input=min(self.fresh_images, given - cached - audio),
            audio_output=spoken,
            reasoning=min(self.reasoning, made - spoken),
            requests=1,
        )


def read_usage(response: dict[str, Any]) -> RealtimeUsage | None:
    """The ``usage`` of a response that ended; None where it is missing or makes no sense."""
    usage = part_of(response, "usage")
    given, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if given is None or made is None:
        return None
    details, said = part_of(usage, "input_token_details"), part_of(usage, "output_token_details")
    kept = part_of(details, "cached_tokens_details")

    def fresh(name: str) -> int:
        return max(0, (count(details, name) or 0) - (count(kept, name) or 0))

    return RealtimeUsage(
        given,
        made,
        count(details, "cached_tokens") or 0,
        fresh("audio_tokens"),
        fresh("image_tokens"),
        count(said, "audio_tokens") or 0,
        count(said, "reasoning_tokens") or 0,
    )


@value(frozen=True, slots=True)
class TranscriptUsage:
    """What a transcription used, as the upstream says; None for what it does not say."""

    audio_ms: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    audio_tokens: int = 0


def read_transcript_usage(document: dict[str, Any]) -> TranscriptUsage:
    """The ``usage`` of a transcription, which is told in tokens or in seconds."""
    usage = part_of(document, "usage")
    seconds = usage.get("seconds")
    audio_ms = None
    if isinstance(seconds, (int, float)) and 0 <= seconds < _MOST_SECONDS:
        audio_ms = ceil(seconds * 1000)
    return TranscriptUsage(
        audio_ms,
        count(usage, "input_tokens"),
        count(usage, "output_tokens"),
        count(part_of(usage, "input_token_details"), "audio_tokens") or 0,
    )
