"""Server-sent events of the OpenAI APIs, passed on as they come.

Nothing is parsed but the first event and the few that hold a usage, an error or a finish. What a client may see is
handed out at once, in whole events, but for two kinds: the latest report of usage waits for the event behind it,
because only the one before ``[DONE]`` gets the cost written in; and output that nothing is held for waits until there
is.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.config.model import CountOutput
from gateway.domain.price import Tokens
from gateway.domain.request import Ask, Bound
from gateway.upstream.count import OutputCount
from gateway.upstream.usage import Usage, billed, billed_without_usage, read_usage

# In JSON text a quoted word cannot stand inside a string unescaped, so these match fields and never content.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
# Where output stands in a chunk, by API. Some servers send reasoning under both of its names.
_STRING = rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TEXT_OUTPUT = re.compile(rb'"text"' + _STRING)
_CHAT_OUTPUT = re.compile(rb'"(?:content|reasoning|refusal|arguments|name|input)"' + _STRING)
_CHAT_OUTPUT_OLD = re.compile(rb'"(?:content|reasoning_content|refusal|arguments|name|input)"' + _STRING)
_REASONING = re.compile(rb'"reasoning"\s*:\s*"[^"]')
_OTHER_OUTPUT = re.compile(rb'"(?:content|thinking|arguments|input|reasoning_details)"\s*:\s*([\[{]\s*["{\[0-9])')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")

#: As many tokens as a stream may hand out that is covered whatever it says.
UNLIMITED = sys.maxsize

#: The largest single event that is held until it is complete.
MAX_EVENT_BYTES = 16 * 2**20

_FRAME_FIELDS = ("id", "object", "created", "model", "system_fingerprint")
_SEAM_BYTES = 4096
# Events are not quite tokens: only a stream that runs far beyond its limit is cut.
_SPARE_EVENTS = 64


class BrokenStream(Exception):
    """The upstream's stream is none: an event without end."""


class Overrun(Exception):
    """The upstream does not stop: far more output than it was asked for."""


class EventStream:
    """Follows the stream that answers ask within bound; rule: how its output is counted.

    ``covered`` is the number of tokens that the client may be handed in all; output beyond it is ``waiting``, and the
    events behind it too. After ``done``, ``closing`` gives the events that end the stream. failed: the upstream sent an
    error as an event; error_shown: in a form that clients take for one.
    """

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        self._ask = ask
        self._bound = bound
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._waiting: list[bytes] = []
        self._wanted = 0
        self._held = b""
        self._held_with = bytearray()
        self._before_last = b""
        self._tail = b""
        self._usage: Usage | None = None
        self._usage_is_final = False
        self._summed: Usage | None = None
        # Of several answers some servers report one at a time: then a report is not the sum of what was made.
        self._running_usage = rule == "usage" and bound.answers == 1
        self._count = OutputCount("chunks" if rule == "usage" and bound.answers > 1 else rule)
        self._frame: dict[str, Any] | None = None
        self._closed: set[int] = set()
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
        return self._count.events > 0

    @property
    def counted(self) -> int:
        """Output tokens that the client was handed so far, of all answers, by the rule."""
        return self._count.tokens

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
        return self._pass_on(chunk if end == len(chunk) else chunk[:end], covered)

    def release(self, covered: int) -> bytes:
        """What waited and may go out now that more is covered. Raises Overrun."""
        waiting, self._waiting = self._waiting, []
        return self._pass_on(b"".join(waiting), covered)

    def end(self, covered: int = UNLIMITED) -> bytes:
        """The upstream closed the connection: what is left counts as an event, even without its blank line."""
        left, self._parts = b"".join(self._parts), []
        if _DONE.search(left):
            return self._pass_on(left, covered)
        # An error will follow: behind half an event, or without a blank line between, it would be read as part of it.
        return b"" if _json_of(left) is None else self._pass_on(left.rstrip(b"\r\n") + b"\n\n", covered)

    def _keep(self, piece: bytes) -> None:
        if self._parts and len(self._parts[-1]) < _SEAM_BYTES:
            self._parts[-1] += piece  # so that the last piece always holds the end of a blank line
        else:
            self._parts.append(piece)
        self._parts_bytes += len(piece)
        if self._parts_bytes > MAX_EVENT_BYTES:
            raise BrokenStream(f"an event of more than {MAX_EVENT_BYTES} bytes")

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """End the stream here, as if the upstream had come to its limit; what waits is dropped.

        Every answer that is still open gets its finish, with quota beside it, which says why.
        """
        self._waiting = []
        frame = self._frame or {"id": "", "object": "", "created": 0, "model": self._ask.model}
        chat = self._ask.operation == "chat"
        empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        finishes = [
            _event_of(
                {
                    **frame,
                    "choices": [{"index": index, **empty, "logprobs": None, "finish_reason": "length"}],
                    "quota": quota,
                }
            )
            for index in range(self._bound.answers)
            if index not in self._closed
        ]
        self._before_last = b"".join((self._held, self._held_with, *finishes))
        self._held, self._held_with = b"", bytearray()
        if self._ask.wants_usage:
            self._held = _event_of({**frame, "choices": [], "usage": _usage_of(self.tokens(complete=False))})
        self._tail = b"data: [DONE]\n\n"
        self.done = True

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The end of the stream: the last usage, with cost's fields where the client asked for it, and ``[DONE]``."""
        held = self._held
        if held and cost is not None and self._ask.wants_usage:
            held = _with_cost(held, cost)
        return self._before_last + held + self._held_with + self._tail

    def tokens(self, *, complete: bool) -> Tokens:
        """The tokens to charge for the stream as far as it went; complete: to its end."""
        usage = self._usage
        if not self.has_output and not (usage and usage.reasoning_tokens):
            return Tokens(0, 0)
        if usage is None:
            return billed_without_usage(self._ask, self._bound, self._count.billable)
        least = 0
        if not (complete and self._usage_is_final):
            least = self._count.billable  # the usage may be that of an earlier moment
        elif self._bound.answers > 1:
            least = self._count.events  # some servers report one answer of several; an event is a token at least
        return billed(usage, self._ask, self._bound, least)

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
        if self._frame is None:
            self._frame = _frame_of(block)
        texts = self._outputs(block)
        if self._needs_a_look(block) or self._count.tokens_with(texts) > covered:
            block = self._one_by_one(_split(block), covered)
        else:
            self._count.add(texts)
        if self._count.events > 2 * self._most_output + _SPARE_EVENTS:
            self._overran = True  # said with the next piece, so that this one is handed out before it is charged
        return block

    def _needs_a_look(self, block: bytes) -> bool:
        return bool(
            self._held
            or b"usage" in block
            or b"[DONE]" in block
            or b'"error"' in block
            or _FINISHED.search(block) is not None
        )

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

    def _tokens_with(self, event: bytes, texts: list[bytes]) -> int:
        """The tokens that would be counted with event, by its own report where it has one."""
        tokens = self._count.tokens_with(texts)
        if self._running_usage and _USAGE.search(event) and isinstance(document := _json_of(event), dict):
            usage = read_usage(document.get("usage"), self._ask.operation)
            return tokens if usage is None else min(usage.output_tokens, self._most_output)
        return tokens

    def _outputs(self, block: bytes) -> list[bytes]:
        """The texts in block that are output, none empty, as they stand in its JSON."""
        if self._ask.operation != "chat":
            found = _TEXT_OUTPUT.findall(block)
        else:
            old = b'"reasoning_content"' in block and not _REASONING.search(block)
            found = (_CHAT_OUTPUT_OLD if old else _CHAT_OUTPUT).findall(block)
        texts = [text for text in found if text]
        # What is said in no text that is known here is output all the same.
        return texts or _OTHER_OUTPUT.findall(block)

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        """What to hand out when event has come, which may hold usage or be the last."""
        if self.done:
            return b""
        if _DONE.search(event):
            self.done = True
            self._tail = event
            return b""
        self._count.add(texts)  # now, because one that is kept back may be the whole answer
        if self._held and b"data:" not in event:
            self._held_with += event  # a comment does not part the usage from the end
            if len(self._held_with) > MAX_EVENT_BYTES:
                raise BrokenStream("comments without end")
            return b""
        released = self._release_held()
        if _USAGE.search(event) or b'"error"' in event or _FINISHED.search(event):
            document = _json_of(event)
            if isinstance(document, dict):
                if self._read(document, event):
                    return released
                event = self._without_running_usage(document, event)
        return released + event

    def _release_held(self) -> bytes:
        """The report of usage that turns out not to be the last."""
        held, self._held = self._held, b""
        held_with, self._held_with = bytes(self._held_with), bytearray()
        if held and self._running_usage and isinstance(document := _json_of(held), dict):
            held = self._without_running_usage(document, held)
        return held + held_with

    def _without_running_usage(self, document: dict[str, Any], event: bytes) -> bytes:
        # Clients add up what they find on chunks: who did not ask for running reports must not meet them.
        if not self._running_usage or self._ask.wants_running_usage or not document.get("choices"):
            return event
        if not document.get("usage"):
            return event
        shown = {name: value for name, value in document.items() if name != "usage"}
        return _event_of({**shown, "usage": None} if self._ask.wants_usage else shown, otherwise=event)

    def _read(self, document: dict[str, Any], event: bytes) -> bool:
        """Take an event that may hold usage or an error; whether it is not handed out, or not yet."""
        if document.get("error") or document.get("object") == "error":
            self.failed = True
            self.error_shown = self.error_shown or bool(document.get("error"))
            return False
        self._closed.update(_finished_in(document))
        usage = read_usage(document.get("usage"), self._ask.operation)
        usage_only = document.get("choices") == []
        if usage is not None:
            self._usage_is_final = usage_only or _FINISHED.search(event) is not None
            self._usage = self._sum(usage) if usage_only and self._bound.answers > 1 else usage
            if self._running_usage:
                self._count.report(min(usage.output_tokens, self._most_output))
        if usage_only and not self._ask.wants_usage:
            return True
        if usage is not None and self._usage_is_final:
            self._held = event
            return True
        return False

    @property
    def _most_output(self) -> int:
        return self._bound.tokens(self._bound.output_tokens_each).output

    def _sum(self, usage: Usage) -> Usage:
        # llama.cpp reports each answer of n > 1 by itself; others send one report of all.
        same_prompt = self._ask.prompts == 1
        self._summed = usage if self._summed is None else self._summed.plus(usage, same_prompt=same_prompt)
        return self._summed


def _finished_in(document: dict[str, Any]) -> list[int]:
    """The answers that a chunk ends."""
    choices = document.get("choices")
    return [
        choice["index"]
        for choice in (choices if isinstance(choices, list) else [])
        if isinstance(choice, dict) and choice.get("finish_reason") and isinstance(choice.get("index"), int)
    ]


def _frame_of(block: bytes) -> dict[str, Any] | None:
    """What all chunks of a stream have in common, from the first event that has choices; None where there is none."""
    for event in _split(block):
        document = _json_of(event)
        if isinstance(document, dict) and isinstance(document.get("choices"), list):
            return {name: document[name] for name in _FRAME_FIELDS if name in document}
    return None


def _usage_of(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.input,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.input + tokens.output,
    }


def _event_of(document: Mapping[str, object], otherwise: bytes = b"") -> bytes:
    try:
        return b"data: " + orjson.dumps(document) + b"\n\n"
    except orjson.JSONEncodeError:  # nested deeper than the library writes
        return otherwise


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
    return _event_of(document, otherwise=event)  # which the client gets as it came
