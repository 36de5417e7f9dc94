"""What the endpoints of images and audio have in common: what their answers report, and their streams.

Nobody can ask them for less output, so all that a request can cost is held, and nothing has to wait in a stream.
"""

import re
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import UNLIMITED, EventStream, event_of, json_of
from gateway.upstream.usage import Usage, billed, count

# Words in all events that must be followed. In JSON text a quoted word cannot stand inside a string unescaped, so they
# match fields and types.
_TURN = re.compile(rb'"usage"|"error"|\.(?:completed|done)"|\[DONE\]')


def read_media_usage(usage: object, *, input_is: str = "", output_is: str = "") -> Usage | None:
    """A ``usage`` that counts tokens; None where it counts none or makes no sense. input_is, output_is: what tokens are
    that it does not tell apart: image, audio, or text where empty."""
    if not isinstance(usage, dict):
        return None
    given, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if given is None or made is None or not (given or made):
        return None
    of_input = _kinds(usage, ("input_tokens_details", "input_token_details"), given, input_is)
    of_output = _kinds(usage, ("output_tokens_details", "output_token_details"), made, output_is)
    return Usage(
        given,
        made,
        cache_read_tokens=of_input["cached"],
        audio_input_tokens=of_input["audio"],
        image_input_tokens=of_input["image"],
        audio_output_tokens=of_output["audio"],
        image_output_tokens=of_output["image"],
    )


def _kinds(usage: dict[str, Any], names: tuple[str, ...], tokens: int, otherwise: str) -> dict[str, int]:
    details: dict[str, Any] = next((usage[name] for name in names if isinstance(usage.get(name), dict)), {})
    kinds = {kind: count(details, f"{kind}_tokens") or 0 for kind in ("cached", "audio", "image")}
    if otherwise and not details:
        kinds[otherwise] = tokens
    return kinds


def billed_media(usage: Usage | None, ask: Ask, bound: Bound, unreported: Metered) -> Metered:
    """What to charge, never beyond the bound. unreported: what to charge for without a usage; its units count with one,
    too."""
    most = bound.metered(bound.output_tokens_each)
    if usage is not None:
        tokens = billed(usage, ask, bound)
    else:
        given, made = min(unreported.input, most.input), min(unreported.output, most.output)
        tokens = replace(
            unreported,
            input=given,
            output=made,
            audio_input=min(unreported.audio_input, given),
            audio_output=min(unreported.audio_output, made),
            image_output=min(unreported.image_output, made),
        )
    return replace(
        tokens,
        images=unreported.images,
        audio_ms=min(unreported.audio_ms, most.audio_ms),
        characters=most.characters,
        requests=most.requests,
    )


class MediaStream(EventStream):
    """Events of which one ends each answer; all are passed on unchanged, but for the cost in the very last.

    last_types: the types of those that end an answer. The stream itself ends with its connection, or with a mark.
    """

    last_types: ClassVar[frozenset[str]]

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._most_events = sys.maxsize  # in how many pieces a picture or a voice is shown says nothing of its tokens
        self._ends_left = self._answers()
        self._last: tuple[bytes, dict[str, Any]] | None = None
        self._tail = b""
        self._ended_one = False

    @property
    def complete(self) -> bool:
        """Whether the events that end the answers have come."""
        return self._ends_left <= 0

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """Never asked for: all that the stream can cost is held."""
        raise AssertionError("a stream that holds its maximum needs no more")

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The last event with the cost in its usage, if it has one, and the mark behind it."""
        if self._last is None:
            return self._tail
        event, document = self._last
        if cost is not None and isinstance(usage := document.get("usage"), dict):
            told = event_of({**document, "usage": {**usage, **cost}})
            name = b"event: " + document["type"].encode() + b"\n" if event.startswith(b"event:") else b""
            event = name + told if told else event
        return event + self._tail

    def end(self, covered: int = UNLIMITED) -> bytes:
        """The upstream closed the connection, which is how most of these streams end."""
        left = super().end(covered)
        self.done = self.done or (self._ended_one and not self.failed)
        return left

    def _answers(self) -> int:
        """How many answers the stream has."""
        return 1

    @abstractmethod
    def _take(self, document: dict[str, Any]) -> None:
        """Take an event that ends an answer, or holds a usage."""

    def _is_last(self, event: bytes) -> bool:
        return b"[DONE]" in event and json_of(event) is None

    def _needs_a_look(self, block: bytes) -> bool:
        return self._last is not None or _TURN.search(block) is not None

    def _outputs(self, block: bytes) -> list[bytes]:
        return [b"data"] if b"data:" in block else []

    def _tokens_with(self, event: bytes, texts: list[bytes]) -> int:
        return 0

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        if self.done:
            return b""
        if self._is_last(event):
            self.done, self._tail = True, self._tail + event
            return b""
        document = json_of(event)
        if isinstance(document, dict) and (document.get("error") or document.get("type") == "error"):
            self.failed = self.done = True
            self.error_shown = bool(document.get("error"))
            return event
        self._count.add(texts)
        if self._last is not None:
            self._tail += event  # a comment: nothing that matters comes behind the last
            return b""
        return self._pass_or_keep(event, document)

    def _pass_or_keep(self, event: bytes, document: object) -> bytes:
        if not isinstance(document, dict):
            return event
        ends_one = document.get("type") in self.last_types
        if ends_one or document.get("usage"):
            self._take(document)
        self._ended_one = self._ended_one or ends_one
        self._ends_left -= ends_one
        if ends_one and self.complete:
            self._last = event, document
            return b""
        return event
