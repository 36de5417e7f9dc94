"""Server-sent events of the OpenAI APIs, passed on as they come.

Nothing is parsed but the few events that hold a usage or an error. What a client may see is handed out at once, in
whole events, except the latest report of usage: it waits for the event behind it, because only the one before
``[DONE]`` gets the cost written in.
"""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.domain.price import Tokens
from gateway.domain.request import BYTES_PER_TOKEN, Ask, Bound
from gateway.upstream.usage import Usage, billed, billed_without_usage, read_usage

# In JSON text a quoted word cannot stand inside a string unescaped, so these match fields and never content.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
# Where output stands in a chunk, by API. Some servers send reasoning under both of its names.
_STRING = rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TEXT_OUTPUT = re.compile(rb'"text"' + _STRING)
_CHAT_OUTPUT = re.compile(rb'"(?:content|reasoning|refusal|arguments|name|input)"' + _STRING)
_CHAT_OUTPUT_OLD = re.compile(rb'"(?:content|reasoning_content|refusal|arguments|name|input)"' + _STRING)
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")

#: The largest single event that is held until it is complete.
MAX_EVENT_BYTES = 16 * 2**20

_SEAM_BYTES = 4096
# Events are not quite tokens: only a stream that runs far beyond its limit is cut.
_SPARE_EVENTS = 64


class BrokenStream(Exception):
    """The upstream's stream is none: an event without end."""


class Overrun(Exception):
    """The upstream does not stop: far more output than it was asked for."""


class EventStream:
    """Follows the stream that answers ask within bound. After ``done``, ``closing`` gives the events that end it.

    failed: the upstream sent an error as an event; error_shown: in a form that clients take for one.
    """

    def __init__(self, ask: Ask, bound: Bound) -> None:
        self._ask = ask
        self._bound = bound
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._held = b""
        self._held_with = b""
        self._tail = b""
        self._usage: Usage | None = None
        self._usage_is_final = False
        self._summed: Usage | None = None
        self._output_events = 0
        self._output_bytes = 0
        self.done = False
        self._overran = False
        self.failed = False
        self.error_shown = False

    @property
    def usage(self) -> Usage | None:
        """The latest report."""
        return self._usage

    @property
    def has_output(self) -> bool:
        """Whether the client was handed anything to pay for."""
        return self._output_events > 0

    def feed(self, chunk: bytes) -> bytes:
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
        return self._pass_on(chunk if end == len(chunk) else chunk[:end])

    def end(self) -> bytes:
        """The upstream closed the connection: what is left counts as an event, even without its blank line."""
        left, self._parts = b"".join(self._parts), []
        if _DONE.search(left):
            return self._pass_on(left)
        # An error will follow: behind half an event, or without a blank line between, it would be read as part of it.
        return b"" if _json_of(left) is None else self._pass_on(left.rstrip(b"\r\n") + b"\n\n")

    def _keep(self, piece: bytes) -> None:
        if self._parts and len(self._parts[-1]) < _SEAM_BYTES:
            self._parts[-1] += piece  # so that the last piece always holds the end of a blank line
        else:
            self._parts.append(piece)
        self._parts_bytes += len(piece)
        if self._parts_bytes > MAX_EVENT_BYTES:
            raise BrokenStream(f"an event of more than {MAX_EVENT_BYTES} bytes")

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The end of the stream: the last usage, with cost's fields where the client asked for it, and ``[DONE]``."""
        held = self._held
        if held and cost is not None and self._ask.wants_usage:
            held = _with_cost(held, cost)
        return held + self._held_with + self._tail

    def tokens(self, *, complete: bool) -> Tokens:
        """The tokens to charge for the stream as far as it went; complete: to its end."""
        usage = self._usage
        if not self.has_output and not (usage and usage.reasoning_tokens):
            return Tokens(0, 0)
        counted = max(self._output_events, -(-self._output_bytes // BYTES_PER_TOKEN))
        if usage is None:
            return billed_without_usage(self._ask, self._bound, counted)
        least = 0
        if not (complete and self._usage_is_final):
            least = counted  # the usage may be that of an earlier moment
        elif self._bound.answers > 1:
            least = self._output_events  # some servers report one answer of several; an event is a token at least
        return billed(usage, self._ask, self._bound, least)

    def _pass_on(self, block: bytes) -> bytes:
        if self._overran:
            raise Overrun("the upstream sends more output than it was asked for")
        if not block or self.done:
            return b""
        if self._held or b"usage" in block or b"[DONE]" in block or b'"error"' in block:
            block = b"".join([self._follow(event) for event in _split(block)])
        else:
            self._count(block)
        if self._output_events > 2 * self._bound.tokens(self._bound.output_tokens_each).output + _SPARE_EVENTS:
            self._overran = True  # said with the next piece, so that this one is handed out before it is charged
        return block

    def _count(self, events: bytes) -> None:
        for text in self._outputs(events):
            if text:
                self._output_events += 1
                self._output_bytes += len(text)

    def _outputs(self, block: bytes) -> list[bytes]:
        if self._ask.operation != "chat":
            return _TEXT_OUTPUT.findall(block)
        old = b'"reasoning_content"' in block and b'"reasoning"' not in block
        return (_CHAT_OUTPUT_OLD if old else _CHAT_OUTPUT).findall(block)

    def _follow(self, event: bytes) -> bytes:
        """What to hand out when event has come, which may hold usage or be the last."""
        if self.done:
            return b""
        if _DONE.search(event):
            self.done = True
            self._tail = event
            return b""
        self._count(event)  # now, because one that is kept back may be the whole answer
        if self._held and b"data:" not in event:
            self._held_with += event  # a comment does not part the usage from the end
            return b""
        released = self._held + self._held_with
        self._held = self._held_with = b""
        if _USAGE.search(event) or b'"error"' in event:
            document = _json_of(event)
            if isinstance(document, dict) and self._read(document, event):
                return released
        return released + event

    def _read(self, document: dict[str, Any], event: bytes) -> bool:
        """Take an event that may hold usage or an error; whether it is not handed out, or not yet."""
        if document.get("error") or document.get("object") == "error":
            self.failed = True
            self.error_shown = self.error_shown or bool(document.get("error"))
            return False
        usage = read_usage(document.get("usage"), self._ask.operation)
        usage_only = document.get("choices") == []
        if usage is not None:
            self._usage_is_final = usage_only or _FINISHED.search(event) is not None
            self._usage = self._sum(usage) if usage_only and self._bound.answers > 1 else usage
        if usage_only and not self._ask.wants_usage:
            return True
        if usage is not None and self._usage_is_final:
            self._held = event
            return True
        return False

    def _sum(self, usage: Usage) -> Usage:
        # llama.cpp reports each answer of n > 1 by itself; others send one report of all.
        same_prompt = self._ask.prompts == 1
        self._summed = usage if self._summed is None else self._summed.plus(usage, same_prompt=same_prompt)
        return self._summed


def _end_of_events(data: bytes) -> int:
    if data.endswith(b"\n\n"):
        return len(data)
    ends = [data.rfind(mark) + len(mark) for mark in (b"\n\n", b"\n\r\n", b"\r\r") if mark in data]
    return max(ends, default=0)


def _split(block: bytes) -> list[bytes]:
    events, start = [], 0
    for end in _EVENT_END.finditer(block):
        events.append(block[start : end.end()])
        start = end.end()
    if start < len(block):
        events.append(block[start:])
    return events


def _json_of(event: bytes) -> object:
    lines = (line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        return orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None


def _with_cost(event: bytes, cost: Mapping[str, object]) -> bytes:
    document = _json_of(event)
    assert isinstance(document, dict)  # it was read when it came
    document["usage"] = {**document["usage"], **cost}
    try:
        return b"data: " + orjson.dumps(document) + b"\n\n"
    except orjson.JSONEncodeError:  # nested deeper than the library writes: the client gets it as it came
        return event
