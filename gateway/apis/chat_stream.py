"""Streams of the completions endpoints: chunks with choices, then usage, then ``[DONE]``.

Nothing is parsed but the first event and the few that hold a usage, an error, a finish, or no text that is known here.
The latest report of usage waits for the event behind it, because only the one before ``[DONE]`` gets the cost written
in.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import (
    MAX_EVENT_BYTES,
    BrokenStream,
    EventStream,
    each_event,
    event_of,
    events_in,
    json_of,
    on_one_line,
    unread,
)
from gateway.upstream.usage.billing import billed, billed_without_usage
from gateway.upstream.usage.choices import read_usage
from gateway.upstream.usage.figures import Usage

# In JSON text a quoted word cannot stand inside a string unescaped, so these match fields and never content.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_USAGE = re.compile(rb',\s*"usage"\s*:\s*null(?=\s*[,}])')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
# Where output stands in a chunk, by API. Some servers send reasoning under both of its names.
_STRING = rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TEXT_OUTPUT = re.compile(rb'"text"' + _STRING)
_CHAT_OUTPUT = re.compile(rb'"(?:content|reasoning|refusal|arguments|name|input)"' + _STRING)
_CHAT_OUTPUT_OLD = re.compile(rb'"(?:content|reasoning_content|refusal|arguments|name|input)"' + _STRING)
_REASONING = re.compile(rb'"reasoning"\s*:\s*"[^"]')
_OTHER_OUTPUT = re.compile(rb'"(?:content|thinking|arguments|input|reasoning_details)"\s*:\s*([\[{]\s*["{\[0-9])')
# What tells of tokens that have no text: which stop matched (vLLM, SGLang), and logprobs. Of an event it is one token.
_SIGN = re.compile(
    rb'"(?:stop_reason|matched_stop)"\s*:\s*("[^"]|-?[0-9])'
    rb'|"(?:tokens|token_ids|token_logprobs|top_logprobs|refusal)"\s*:\s*([\[{]\s*[^\]}\s])'
)
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)

_FRAME_FIELDS = ("id", "object", "created", "model", "system_fingerprint")


class ChoicesStream(EventStream):
    """What both endpoints have in common."""

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        # Of several answers some servers report one at a time: then a report is not the sum of what was made.
        super().__init__(ask, bound, "chunks" if rule == "usage" and bound.answers > 1 else rule)
        self._running_usage = rule == "usage" and bound.answers == 1
        self._held = b""
        self._held_with = bytearray()
        self._before_last = b""
        self._tail = b""
        self._usage_is_final = False
        self._summed: Usage | None = None
        self._frame: dict[str, Any] | None = None
        self._closed: set[int] = set()

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """A finish for every open answer, with quota beside it, and the usage, if asked for."""
        self._waiting = []
        frame = self._frame or {"id": "", "object": "", "created": 0, "model": self._ask.model}
        finishes = [
            event_of(
                {
                    **frame,
                    "choices": [{"index": index, **self._empty, "logprobs": None, "finish_reason": "length"}],
                    "quota": quota,
                }
            )
            for index in range(self._bound.answers)
            if index not in self._closed
        ]
        self._before_last = b"".join((self._held, self._held_with, *finishes))
        self._held, self._held_with = b"", bytearray()
        if self._ask.wants_usage:
            self._held = event_of({**frame, "choices": [], "usage": _usage_of(self.metered(complete=False))})
        self._tail = b"data: [DONE]\n\n"
        self.done = True

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The last usage and ``[DONE]``."""
        held = self._held
        if cost is not None and self._ask.wants_usage:
            if not held and self.usage is None and self._frame:  # the upstream told none; what is charged is told
                held = event_of({**self._frame, "choices": [], "usage": _usage_of(self.metered(complete=True))})
            held = _with_cost(held, cost) if held else held
        return self._before_last + held + self._held_with + self._tail

    def metered(self, *, complete: bool) -> Metered:
        """By the upstream's report as far as it is believed, else by what was counted."""
        usage = self.usage
        if not self.payable:
            return Metered()
        if usage is None:
            return billed_without_usage(self._ask, self._bound, self._count.billable)
        least = 0
        if not (complete and self._usage_is_final):
            least = self._count.billable  # the usage may be that of an earlier moment
        elif self._bound.answers > 1 or not usage.output_tokens:
            # Some servers report one answer of several, or nothing of what they say; an event is a token at least.
            least = self._count.events
        return billed(usage, self._ask, self._bound, least)

    @property
    @abstractmethod
    def _empty(self) -> dict[str, Any]:
        """A choice that says nothing."""

    @abstractmethod
    def _texts_in(self, line: bytes) -> list[bytes]:
        """The texts of an event whose data is on one line."""

    def _outputs(self, block: bytes) -> list[bytes]:
        return [text for event in events_in(block) for text in self._outputs_of(event)]

    def _outputs_of(self, event: bytes) -> list[bytes]:
        line = on_one_line(event)
        # What is said in no text that is known here is output all the same.
        if texts := [text for text in self._texts_in(line) if text] or _OTHER_OUTPUT.findall(line):
            return texts
        sign = _SIGN.search(line)
        return [sign[1] or sign[2]] if sign else unread(event)

    def _meet(self, block: bytes) -> None:
        if self._frame is None:
            self._frame = _frame_of(block)

    def _quiet(self) -> bool:
        return super()._quiet() and not self._held and self._frame is not None

    def _is_last(self, event: bytes) -> bool:
        return b"[DONE]" in event and _DONE.search(event) is not None

    def _needs_a_look(self, block: bytes) -> bool:
        return bool(
            self._held
            or (b"usage" in block and b"usage" in _NO_USAGE.sub(b"", block))
            or b"[DONE]" in block
            or b'"error"' in block
            or _FINISHED.search(block) is not None
        )

    def _tokens_with(self, event: bytes, texts: list[bytes]) -> int:
        """The tokens that would be counted with event, by its own report where it has one."""
        tokens = self._count.tokens_with(texts)
        if self._running_usage and _USAGE.search(on_one_line(event)) and isinstance(document := json_of(event), dict):
            usage = read_usage(document.get("usage"))
            return tokens if usage is None else min(usage.output_tokens, self._most_output)
        return tokens

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        """What to hand out when event has come, which may hold usage or be the last."""
        if self.done:
            return b""
        if self._is_last(event):
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
        line = on_one_line(event)
        if _USAGE.search(line) or b'"error"' in line or _FINISHED.search(line):
            document = json_of(event)
            if isinstance(document, dict):
                if self._read(document, event, finished=_FINISHED.search(line) is not None):
                    return released
                event = self._without_running_usage(document, event)
        return released + self._shown(event)

    def _shown(self, block: bytes) -> bytes:
        """Events without the empty usage that upstreams put into every one of them once they are asked for any."""
        if self._ask.wants_usage or self._ask.wants_running_usage or b'"usage"' not in block:
            return block
        return _NO_USAGE.sub(b"", block)

    def _release_held(self) -> bytes:
        """The report of usage that turns out not to be the last."""
        held, self._held = self._held, b""
        held_with, self._held_with = bytes(self._held_with), bytearray()
        if held and self._running_usage and isinstance(document := json_of(held), dict):
            held = self._without_running_usage(document, held)
        return held + held_with

    def _without_running_usage(self, document: dict[str, Any], event: bytes) -> bytes:
        # Clients add up what they find on chunks: who did not ask for running reports must not meet them.
        if not self._running_usage or self._ask.wants_running_usage or not document.get("choices"):
            return event
        if not document.get("usage"):
            return event
        shown = {name: value for name, value in document.items() if name != "usage"}
        return event_of({**shown, "usage": None} if self._ask.wants_usage else shown, otherwise=event)

    def _read(self, document: dict[str, Any], event: bytes, *, finished: bool) -> bool:
        """Take an event that may hold usage or an error; whether it is not handed out, or not yet."""
        if document.get("error") or document.get("object") == "error":
            self.failed = True
            self.error_shown = self.error_shown or bool(document.get("error"))
            return False
        self._closed.update(_finished_in(document))
        usage = read_usage(document.get("usage"))
        usage_only = document.get("choices") == []
        if usage is not None:
            self._usage_is_final = usage_only or finished
            self.usage = self._sum(usage) if usage_only and self._bound.answers > 1 else usage
            if self._running_usage:
                self._count.report(min(usage.output_tokens, self._most_output))
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


class ChatStream(ChoicesStream):
    """Chunks with deltas."""

    @property
    def _empty(self) -> dict[str, Any]:
        return {"delta": {}}

    def _texts_in(self, line: bytes) -> list[bytes]:
        old = b'"reasoning_content"' in line and not _REASONING.search(line)
        return (_CHAT_OUTPUT_OLD if old else _CHAT_OUTPUT).findall(line)


class TextStream(ChoicesStream):
    """Chunks with text."""

    @property
    def _empty(self) -> dict[str, Any]:
        return {"text": ""}

    def _texts_in(self, line: bytes) -> list[bytes]:
        return _TEXT_OUTPUT.findall(line)


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
    for event in each_event(block):
        document = json_of(event)
        if isinstance(document, dict) and isinstance(document.get("choices"), list):
            frame = {name: document[name] for name in _FRAME_FIELDS if name in document}
            return frame if event_of(frame) else None
    return None


def _usage_of(tokens: Metered) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.input,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.input + tokens.output,
    }


def _with_cost(event: bytes, cost: Mapping[str, object]) -> bytes:
    document = json_of(event)
    assert isinstance(document, dict)  # it was read when it came
    document["usage"] = {**document["usage"], **cost}
    return event_of(document, otherwise=event)  # which the client gets as it came
