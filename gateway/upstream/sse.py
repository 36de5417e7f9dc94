"""Server-sent events from an upstream, passed on as they come.

What a client may see is handed out at once, in whole events, but for output that nothing is held for: it waits until
there is. What the events mean is each endpoint's own: a subclass reads them, and only those that it must.
"""

import json
import re
import sys
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping

import orjson

from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.count import OutputCount
from gateway.upstream.frame import Frame, not_plain
from gateway.upstream.usage.figures import Usage

_EVENT_END = re.compile(rb"\n\r?\n|\r\r")
_NAME = re.compile(rb"(?:\A|[\r\n])event:[ ]?([^\r\n]*)")
# Data that says nothing.
_IDLE = (b"", b"null", b"[DONE]")

#: As many tokens as a stream may hand out that is covered whatever it says.
UNLIMITED = sys.maxsize

#: The largest single event that is held until it is complete.
MAX_EVENT_BYTES = 16 * 2**20

_SEAM_BYTES = 4096
_MOST_FRAME_BYTES = 4096
_MOST_KNOWN_AT_ONCE = 64
# So many events in a row that are like none before them are searched one by one, to learn from them; then all at once.
_MOST_ODD_EVENTS = 4
# Events are not quite tokens: only a stream that runs far beyond its limit is cut.
_SPARE_EVENTS = 16


class BrokenStream(Exception):
    """The upstream's stream is none: an event without end."""


class Overrun(Exception):
    """The upstream does not stop: far more output than it was asked for."""


class EventStream(ABC):
    """Follows the stream that answers ask within bound; rule: how its output is counted.

    ``covered`` is the number of tokens that the client may be handed in all; output beyond it is ``waiting``, and the
    events behind it too. After ``done``, ``closing`` gives the events that end the stream. failed: the upstream sent an
    error as an event; error_shown: in a form that clients take for one. usage: the latest report.
    """

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        self._ask = ask
        self._bound = bound
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._waiting: list[bytes] = []
        self._wanted = 0
        self._count = OutputCount(rule)
        self._overran = False
        self._frame_known: Frame | None = None
        self._known_at_once = 2
        self._at_rest = False  # nothing is kept back, neither whole events nor a part of one
        # Of more events with output than this, the upstream was not asked.
        self._most_events = 2 * self._most_output + _SPARE_EVENTS
        self.usage: Usage | None = None
        self.done = False
        self.failed = False
        self.error_shown = False

    @property
    def has_output(self) -> bool:
        """Whether the client was handed anything to pay for."""
        return self._count.events > 0

    @property
    def payable(self) -> bool:
        """Whether anything is owed for the stream as far as it went: for output, or for what its usage says was made or
        kept unseen."""
        return self.has_output or (self.usage is not None and self._owed_unseen(self.usage))

    @property
    def counted(self) -> int:
        """Output tokens that the client was handed so far, of all answers, by the rule."""
        return self._count.tokens

    @property
    def complete(self) -> bool:
        """Whether all of the answer has come, though the stream has not ended yet."""
        return False

    @property
    def waiting(self) -> bool:
        """Whether there is output that was not covered."""
        return bool(self._waiting)

    @property
    def wanted(self) -> int:
        """How many tokens must be covered for the next event to go out; as many as counted if none waits."""
        return self._wanted if self._waiting else self.counted

    def feed(self, chunk: bytes, covered: int = UNLIMITED) -> bytes:
        """Take bytes as they came; the bytes that the client may have now. Raises BrokenStream, Overrun."""
        if self._parts:
            # Only around the new bytes can an event end: a large one in small pieces is not searched again and again.
            seam = self._parts[-1][-3:] + chunk
            if not _end_of_events(seam):
                self._keep(chunk)
                return b""
            chunk = b"".join((*self._parts, chunk))
            self._parts, self._parts_bytes = [], 0
        end = _end_of_events(chunk)
        if end < len(chunk):
            self._keep(chunk[end:])
        handed_out = self._pass_on(chunk if end == len(chunk) else chunk[:end], covered)
        self._at_rest = self._quiet() and not self._parts
        return handed_out

    def takes(self, chunk: bytes, covered: int = UNLIMITED) -> bytes:
        """What the client may have of chunk if it is nothing but events that differ from one before them in nothing but
        a text, all covered: then they are counted. Else b"", and chunk must be fed.

        A text changes nothing of what an event means. So most events of a stream need not be searched for what they
        hold: 1 µs in place of 6; and many that come together are as good as one.
        """
        frame = self._frame_known
        if frame is None or not self._at_rest or self.done:
            return b""
        told = chunk.removeprefix(frame.start).removesuffix(frame.end)
        size = len(told)
        if size != len(chunk) - frame.around_bytes:
            return b""
        texts = 1
        if size > frame.around_bytes or not_plain(told):
            texts, size, length = frame.texts_in(chunk)
            if length != len(chunk):
                return b""
        count = self._count
        if not size or count.events + texts > self._most_events or not count.took(texts, size, covered):
            return b""
        if frame.shown is None:
            return chunk
        return frame.shown[0] + told + frame.shown[1] if texts == 1 else self._shown(chunk)

    def _known_bytes(self, frame: Frame, block: bytes, start: int, covered: int) -> int:
        """How long block, from start on, holds only events with that frame, all covered; counts them."""
        if not block.startswith(frame.start, start) or not self._quiet():
            return 0
        first = block.find(frame.end, start + len(frame.start), start + _MOST_FRAME_BYTES)
        if first < 0:
            return 0
        # As many as there were lately, and as many again: all of the block would be searched anew for each event where
        # every other one is of another kind.
        window = (first + len(frame.end) - start) * self._known_at_once
        texts, size, length = frame.texts_in(block[start : start + window])
        self._known_at_once = min(2 * (texts + 1), _MOST_KNOWN_AT_ONCE)
        if self._count.events + texts > self._most_events or not self._count.took(texts, size, covered):
            return 0
        return length

    def _learn_frame(self, block: bytes, texts: list[bytes]) -> None:
        """What stands around the text of an event that holds nothing else, for the events behind it."""
        if len(texts) != 1 or not_plain(texts[0]) or len(block) > _MOST_FRAME_BYTES:
            return
        start, quote, rest = block.partition(b'"' + texts[0] + b'"')
        if not quote or quote in rest or _end_of_event(block, 0) < len(block) or not block.endswith(b"\n\n"):
            return
        # The text may stand elsewhere, too, or be a name for what has none: another one in its place must be it.
        if self._outputs(start + b'"x"' + rest) == [b"x"]:
            start, end = start + b'"', b'"' + rest
            shown = self._shown(start), self._shown(end)
            self._frame_known = Frame(start, end, len(start) + len(end), None if shown == (start, end) else shown)

    def release(self, covered: int) -> bytes:
        """What waited and may go out now that more is covered. Raises Overrun."""
        waiting, self._waiting = self._waiting, []
        handed_out = self._pass_on(b"".join(waiting), covered)
        self._at_rest = self._quiet() and not self._parts
        return handed_out

    def end(self, covered: int = UNLIMITED) -> bytes:
        """The upstream closed the connection: what is left counts as an event, even without its blank line."""
        left, self._parts = b"".join(self._parts), []
        if self._is_last(left):
            return self._pass_on(left, covered)
        # An error will follow: behind half an event, or without a blank line between, it would be read as part of it.
        return b"" if json_of(left) is None else self._pass_on(left.rstrip(b"\r\n") + b"\n\n", covered)

    def _keep(self, piece: bytes) -> None:
        if self._parts and len(self._parts[-1]) < _SEAM_BYTES:
            self._parts[-1] += piece  # so that the last piece always holds the end of a blank line
        else:
            self._parts.append(piece)
        self._parts_bytes += len(piece)
        if self._parts_bytes > MAX_EVENT_BYTES:
            raise BrokenStream(f"an event of more than {MAX_EVENT_BYTES} bytes")

    @abstractmethod
    def cut_short(self, quota: Mapping[str, object]) -> None:
        """End the stream here, as if the upstream had come to its limit; what waits is dropped.

        Every answer that is still open gets its end, with quota beside it, which says why.
        """

    @abstractmethod
    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The end of the stream, with cost's fields beside its usage where the client asked for it."""

    @abstractmethod
    def metered(self, *, complete: bool) -> Metered:
        """What to charge for the stream as far as it went; complete: to its end."""

    def error_event(self, error: bytes) -> bytes:
        """An error's body as an event that clients take for one."""
        return b"data: " + error + b"\n\n"

    # --- what endpoints tell apart ------------------------------------------------------------------------------

    def _meet(self, block: bytes) -> None:  # noqa: B027 – most have nothing to note
        """Take note of a block of whole events before anything else is done with it."""

    def _shown(self, block: bytes) -> bytes:
        """What the client is shown of events that need no look, or of a part of one."""
        return block

    def _quiet(self) -> bool:
        """Whether nothing is kept back, and the stream goes on."""
        return not (self._waiting or self.done or self._overran)

    @abstractmethod
    def _is_last(self, event: bytes) -> bool:
        """Whether the event ends the stream, even if the blank line behind it is missing."""

    @abstractmethod
    def _needs_a_look(self, block: bytes) -> bool:
        """Whether any event of block must be followed by itself."""

    @abstractmethod
    def _outputs(self, block: bytes) -> list[bytes]:
        """The texts in block that are output, none empty, as they stand in its JSON."""

    @abstractmethod
    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        """What to hand out when event has come, which holds these texts."""

    def _tokens_with(self, event: bytes, texts: list[bytes]) -> int:
        """The tokens that would be counted with event."""
        return self._count.tokens_with(texts)

    def _owed_unseen(self, usage: Usage) -> bool:
        """Whether a report tells of something to pay for, though nothing was shown."""
        return usage.owed_unseen(self._bound.answers)

    @property
    def _most_output(self) -> int:
        return self._bound.most_output_tokens

    def _pass_on(self, block: bytes, covered: int) -> bytes:
        if self._overran:
            raise Overrun("the upstream sends more output than it was asked for")
        if self.done:
            return b""
        if self._waiting:
            self._waiting.append(block)
            return b""
        if not block:
            return b""
        self._meet(block)
        handed_out = self._in_runs(block, covered)
        if self._count.events > self._most_events:
            self._overran = True  # said with the next piece, so that this one is handed out before it is charged
        return handed_out

    def _in_runs(self, block: bytes, covered: int) -> bytes:
        """What to hand out of a block: known events at once, however many; the others searched."""
        handed_out, start, odd = [], 0, 0
        while start < len(block) and not (self._waiting or self.done):
            frame = self._frame_known
            if frame is not None and (known := self._known_bytes(frame, block, start, covered)):
                odd, end = 0, start + known
                handed_out.append(block[start:end] if frame.shown is None else self._shown(block[start:end]))
            else:
                odd += 1
                end = _end_of_event(block, start) if odd <= _MOST_ODD_EVENTS else len(block)
                handed_out.append(self._searched(block[start:end], covered))
            start = end
        if self._waiting and start < len(block):
            self._waiting.append(block[start:])
        return handed_out[0] if len(handed_out) == 1 else b"".join(handed_out)

    def _searched(self, block: bytes, covered: int) -> bytes:
        """What to hand out of events that must be searched for what they hold."""
        look = self._needs_a_look(block)
        texts = [] if look else self._outputs(block)
        if look or self._count.tokens_with(texts) > covered:
            return self._one_by_one(split_events(block), covered)
        self._count.add(texts)
        self._learn_frame(block, texts)
        return self._shown(block)

    def _one_by_one(self, events: list[bytes], covered: int) -> bytes:
        """What to hand out of events, as far as they are covered; the rest waits."""
        handed_out = []
        for number, event in enumerate(events):
            texts = [] if self.done else self._outputs(event)
            if texts and (tokens := self._tokens_with(event, texts)) > covered:
                self._waiting, self._wanted = events[number:], tokens
                break
            handed_out.append(self._follow(event, texts))
        return b"".join(handed_out)


def event_of(document: Mapping[str, object], otherwise: bytes = b"") -> bytes:
    """A document as an event; otherwise: for one that is nested deeper than can be written."""
    try:
        return b"data: " + orjson.dumps(document) + b"\n\n"
    except orjson.JSONEncodeError:
        return otherwise


def _end_of_events(data: bytes) -> int:
    if data.endswith(b"\n\n"):
        return len(data)
    ends = [data.rfind(mark) + len(mark) for mark in (b"\n\n", b"\n\r\n", b"\r\r") if mark in data]
    return max(ends, default=0)


def each_event(block: bytes) -> Iterator[bytes]:
    """The events of a block, each with its blank line."""
    start = 0
    while start < len(block):
        end = _end_of_event(block, start)
        yield block[start:end]
        start = end


def _end_of_event(block: bytes, start: int) -> int:
    """Where the event that begins at start ends."""
    found = _EVENT_END.search(block, start)
    return found.end() if found else len(block)


def split_events(block: bytes) -> list[bytes]:
    """The same, all at once."""
    return list(each_event(block))


def events_in(block: bytes) -> list[bytes]:
    """The same, unless it is plain that there is only one."""
    return split_events(block) if block.count(b"data:") > 1 else [block]


def on_one_line(event: bytes) -> bytes:
    """An event to search in, its data on one line: it may have come on several that each begin with ``data:``."""
    return b"data: " + _data_of(event).replace(b"\n", b" ") if event.count(b"data:") > 1 else event


def json_of(event: bytes) -> object:
    """What an event's data lines hold; None where it is not JSON. Clients take more for JSON than the standard does:
    NaN and infinities, half characters, bytes that are no UTF-8. So does this."""
    return _read(_data_of(event))


def unread(event: bytes) -> list[bytes]:
    """The data of an event that is no JSON object, unless it says nothing or is an error: it was handed out, so it is
    output, whatever it means."""
    data = _data_of(event).strip()
    if data in _IDLE or isinstance(_read(data), dict) or is_named_error(event):
        return []
    return [data]


def is_named_error(event: bytes) -> bool:
    """Whether the event's name says that it is an error, which clients then take it for, whatever its data is."""
    name = _NAME.search(event)
    return name is not None and name[1].strip() == b"error"


def _data_of(event: bytes) -> bytes:
    # A stream may begin with a mark of its encoding, which is no part of its first field.
    lines = event.removeprefix(BOM_UTF8).splitlines()
    return b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))


def _read(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
