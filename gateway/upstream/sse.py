"""Server-sent events of the OpenAI APIs, passed on as they come.

Nothing is parsed but the few events that hold a usage. What a client may see is handed out at once, in whole
events, except the latest report of usage: it waits for the event behind it, because only the one before ``[DONE]``
gets the cost written in.
"""

import re
from collections.abc import Mapping

import orjson

from gateway.upstream.usage import Usage, read_usage

# In JSON text a quoted word cannot stand inside a string unescaped, so these match fields and never content.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"choices"\s*:\s*\[\s*\]|"finish_reason"\s*:\s*"')
_ERROR = re.compile(rb'^data:\s*\{\s*"(error|object"\s*:\s*"error)"', re.MULTILINE)
_OUTPUT = re.compile(rb'"(?:content|reasoning_content|reasoning|refusal|arguments|text)"\s*:\s*"(?!")')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")

#: The largest single event that is held until it is complete.
MAX_EVENT_BYTES = 16 * 2**20


class BrokenStream(Exception):
    """The upstream's stream is none: an event without end."""


class EventStream:
    """Follows one stream. After ``done``, ``closing`` gives the events that end it.

    usage: the latest report, None so far. output_events: events with output handed out, about one token each.
    failed: the upstream sent an error as an event.
    """

    def __init__(self, *, show_usage: bool, several_answers: bool) -> None:
        self._show_usage = show_usage
        self._several_answers = several_answers
        self._partial = b""
        self._held = b""
        self._tail = b""
        self._summed: Usage | None = None
        self.usage: Usage | None = None
        self.output_events = 0
        self.done = False
        self.failed = False

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes as they came; the bytes that the client may have now. Raises BrokenStream."""
        data = self._partial + chunk if self._partial else chunk
        end = self._end_of_events(data)
        self._partial = data[end:]
        if len(self._partial) > MAX_EVENT_BYTES:
            raise BrokenStream(f"an event of more than {MAX_EVENT_BYTES} bytes")
        block = data if end == len(data) else data[:end]
        if not block or self.done:
            return b""
        if self._held or b"usage" in block or b"[DONE]" in block or b"error" in block:
            block = b"".join(self._follow(event) for event in _split(block))
        self.output_events += len(_OUTPUT.findall(block))
        return block

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The end of the stream: the last usage, with cost's fields where the client asked for it, and ``[DONE]``."""
        held = self._held
        if held and cost is not None and self._show_usage:
            held = _with_cost(held, cost)
        return held + self._tail

    @staticmethod
    def _end_of_events(data: bytes) -> int:
        if data.endswith(b"\n\n"):
            return len(data)
        ends = [data.rfind(mark) + len(mark) for mark in (b"\n\n", b"\n\r\n", b"\r\r") if mark in data]
        return max(ends, default=0)

    def _follow(self, event: bytes) -> bytes:
        """What to hand out when event has come, which may hold usage or be the last."""
        if self.done:
            return b""
        if _DONE.search(event):
            self.done = True
            self._tail = event
            return b""
        released, self._held = self._held, b""
        if _USAGE.search(event) and self._read(event):
            return released
        if _ERROR.search(event):
            self.failed = True
        return released + event

    def _read(self, event: bytes) -> bool:
        """Take the event's usage; whether the event is not handed out, or not yet."""
        document = _json_of(event)
        if not isinstance(document, dict):
            return False
        usage_only = document.get("choices") == []
        if (usage := read_usage(document.get("usage"))) is not None:
            if usage_only and self._several_answers:
                # llama.cpp reports each answer of n > 1 by itself; others send one report of all.
                self._summed = usage = usage if self._summed is None else self._summed.plus_output(usage)
            self.usage = usage
        if usage_only and not self._show_usage:
            return True
        if usage is not None and _FINISHED.search(event):
            self._held = event
            return True
        return False


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
    return b"data: " + orjson.dumps(document) + b"\n\n"
