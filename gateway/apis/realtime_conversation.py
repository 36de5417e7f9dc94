"""What the conversation of a realtime session can hold by now: the bound of the input of its next response.

A usage tells exactly how long the conversation was when its response was made. What came later, or may not have
reached the model by then, is added by its bytes and by the length of its audio. Which it was shows in the order of
events alone: an upstream reads a session's events in the order in which they were sent.
"""

from collections import deque
from dataclasses import dataclass, replace

from gateway.apis.realtime_audio import PCM_BYTES_PER_S, duration_ms, estimated_tokens, most_tokens
from gateway.apis.realtime_events import Content
from gateway.domain.metered import Metered
from gateway.domain.request import BYTES_PER_TOKEN
from gateway.domain.value import value

_MOST_ENTRIES = 1000


@value(frozen=True, slots=True)
class Size:
    """Tokens of input. most: the bound. text, audio: what is charged where no usage says what it was. told: what an
    earlier usage told of, which is then charged as read from the cache."""

    most: int = 0
    text: int = 0
    audio: int = 0
    told: int = 0

    def plus(self, other: "Size") -> "Size":
        """Both."""
        return Size(
            self.most + other.most, self.text + other.text, self.audio + other.audio, max(self.told, other.told)
        )

    def estimated(self) -> Metered:
        """The input to charge where no usage tells it: within the bound."""
        told = min(self.told, self.most)
        audio = min(self.audio, self.most - told)
        text = min(self.text, self.most - told - audio)
        return Metered(input=told + audio + text, cache_read=told, audio_input=audio, requests=1)


@dataclass(slots=True)
class _Entry:
    """Content that no usage has told of yet. number: how many came before it; audio_ms: how much audio did."""

    number: int
    audio_ms: int
    size: Size


@value(frozen=True, slots=True)
class Reach:
    """Up to where the conversation has surely reached the model: entries before number, and audio up to audio_ms."""

    number: int
    audio_ms: int


_NOTHING = Size()


class Conversation:
    """Follows one session. context_window and template_tokens: the model's."""

    def __init__(self, context_window: int, template_tokens: int) -> None:
        self._window = context_window
        self._template = template_tokens
        self._rate = PCM_BYTES_PER_S
        self._told = 0
        self._entries: deque[_Entry] = deque()
        self._numbers = 0
        self._audio_ms = 0
        self._told_audio_ms = 0
        self._committed_ms = 0
        self._heard_ms = 0

    def take_input_rate(self, bytes_per_second: int) -> None:
        """Count audio by what is the longest of all formats that were asked for: which one holds is not known."""
        self._rate = min(self._rate, bytes_per_second)

    def add(self, content: Content) -> None:
        """The client sends content, other than to the audio buffer."""
        self._append(self.size_of(content))

    def add_audio(self, size_bytes: int) -> None:
        """The client appends audio to the buffer."""
        self._audio_ms += duration_ms(size_bytes, self._rate)

    def add_output(self, tokens: int) -> None:
        """A response of so many tokens ended, which no usage tells of as a part of the conversation."""
        self._append(Size(tokens, text=tokens))

    def commit(self) -> None:
        """The client commits the buffer."""
        self._committed_ms = self._audio_ms

    def heard(self, audio_end_ms: int) -> None:
        """The upstream has dealt with the audio up to there, and so with everything that was sent before it."""
        self._heard_ms = max(self._heard_ms, min(audio_end_ms, self._audio_ms))

    @property
    def audio_ms(self) -> int:
        """How much audio was appended to the buffer."""
        return self._audio_ms

    @property
    def reached_ms(self) -> int:
        """How much of it the upstream has surely taken out of the buffer, once it has read what was sent by now."""
        return max(self._committed_ms, self._heard_ms)

    def size_of(self, content: Content) -> Size:
        """Of one content, apart from the conversation."""
        audio_ms = duration_ms(content.audio_bytes, self._rate)
        text = -(-content.text_bytes // BYTES_PER_TOKEN)
        most = self._window if content.anything else content.text_bytes + most_tokens(audio_ms)
        return Size(most, self._window if content.anything else text, estimated_tokens(audio_ms))

    def input_size(self, own: Size = _NOTHING) -> Size:
        """Of the input of a response that were made now, with what it has of its own."""
        audio_ms = self._audio_ms - self._told_audio_ms
        size = Size(self._told + self._template + most_tokens(audio_ms), 0, estimated_tokens(audio_ms), self._told)
        for entry in self._entries:
            size = size.plus(entry.size)
        size = size.plus(own)
        return replace(size, most=min(size.most, self._window))

    def asked(self) -> Reach:
        """What reaches a response that the client asks for now: all but what it has not committed."""
        return Reach(self._numbers, self.reached_ms)

    def begun(self) -> Reach:
        """What has reached a response that the upstream began by itself."""
        number = next((one.number for one in self._entries if one.audio_ms >= self._heard_ms), self._numbers)
        return Reach(number, self._heard_ms)

    def told(self, total_tokens: int, reach: Reach) -> None:
        """A usage tells how long the conversation was that had reached its response, with the response."""
        self._told = min(self._window, total_tokens)
        while self._entries and self._entries[0].number < reach.number:
            self._entries.popleft()
        self._told_audio_ms = max(self._told_audio_ms, reach.audio_ms)

    def _append(self, size: Size) -> None:
        if len(self._entries) < _MOST_ENTRIES:
            self._entries.append(_Entry(self._numbers, self._audio_ms, size))
        else:  # the last one grows, and counts as if all of it came now
            last = self._entries[-1]
            last.number, last.audio_ms, last.size = self._numbers, self._audio_ms, last.size.plus(size)
        self._numbers += 1
