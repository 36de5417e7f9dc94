"""Streams of the Messages API: a message is begun, its blocks are opened, told in deltas and closed, then it ends.

Deltas that say something are passed on unread. ``message_delta``, which holds the final usage, waits for
``message_stop``: by then the cost is known and is written in.
"""

import re
from collections.abc import Mapping
from typing import Any

from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import (
    MAX_EVENT_BYTES,
    BrokenStream,
    EventStream,
    event_of,
    events_in,
    is_named_error,
    json_of,
    on_one_line,
    unread,
)
from gateway.upstream.usage.billing import billed, billed_without_usage
from gateway.upstream.usage.figures import Usage, count
from gateway.upstream.usage.messages import MESSAGE_USAGE_FIELDS, read_message_usage

# In JSON text a quoted word cannot stand inside a string unescaped, so these match fields and never content.
_STRING = rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
# Where output stands. A signature, and the data of thinking that is withheld, stand for thinking that is not shown.
# A stop sequence is said by the model, though not in its answer. What is said in no delta that is known here is output
# all the same; only citations are free.
_OUTPUT = re.compile(
    rb'"(?:text|partial_json|thinking|signature|data|name|stop_sequence)"'
    + _STRING
    # The whole input of a call of a tool, told at once: to the end of its line.
    + rb'|"input"\s*:\s*(\{\s*"[^\r\n]*)'
    + rb'|"type"\s*:\s*"((?!(?:content_block|message|text|input_json|thinking|signature|citations)_delta")\w+_delta)"'
)
# Words in all events that must be followed.
_TURN = re.compile(rb"message_(?:start|delta|stop)|content_block_st|error")
_BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")


class MessageStream(EventStream):
    """Events of one message. The client always gets its usage."""

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._open: dict[int, None] = {}
        self._reported: dict[str, Any] = {}
        self._reported_at = -1
        self._stops = b""
        self._held = b""
        self._held_with = bytearray()
        self._tail = b""

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """A stop for every open block, and an end like that of max_tokens, with the usage as charged and quota beside
        it."""
        self._waiting = []
        self._stops = b"".join(_named_event({"type": "content_block_stop", "index": index}) for index in self._open)
        delta = {"stop_reason": "max_tokens", "stop_sequence": None}
        usage = _usage_of(self.metered(complete=False))
        self._held = _named_event({"type": "message_delta", "delta": delta, "usage": usage, "quota": quota})
        self._tail = _named_event({"type": "message_stop"})
        self.done = True

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """``message_delta`` and ``message_stop``."""
        held = self._held if not self._held or cost is None else self._with_cost(cost)
        return self._stops + held + self._held_with + self._tail

    def metered(self, *, complete: bool) -> Metered:
        """By the upstream's report as far as it is believed, else by what was counted."""
        usage = self.usage
        if not self.payable:
            return Metered()
        if usage is None:
            return billed_without_usage(self._ask, self._bound, self._count.billable)
        # Until the end, the report is that of an earlier moment; and some servers count nothing of what they say.
        told = complete and self._usage_is_final and usage.output_tokens
        least = 0 if told else self._count.billable
        return billed(usage, self._ask, self._bound, least)

    def error_event(self, error: bytes) -> bytes:
        """An error's body as an ``error`` event: SDKs skip events without a name."""
        return b"event: error\ndata: " + error + b"\n\n"

    def _quiet(self) -> bool:
        return super()._quiet() and not self._held

    def _is_last(self, event: bytes) -> bool:
        document = json_of(event)
        return isinstance(document, dict) and document.get("type") == "message_stop"

    def _needs_a_look(self, block: bytes) -> bool:
        return bool(self._held) or _TURN.search(block) is not None

    def _outputs(self, block: bytes) -> list[bytes]:
        return [text for event in events_in(block) for text in _outputs_of(event)]

    def _owed_unseen(self, usage: Usage) -> bool:
        # The output that is reported at the start is a guess.
        return usage.unseen or (self._usage_is_final and super()._owed_unseen(usage))

    @property
    def _usage_is_final(self) -> bool:
        """Whether the output was reported after all of it had come."""
        return self._reported_at == self._count.events

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        """What to hand out when event has come, which may hold usage or be the last."""
        if self.done:
            return b""
        if texts:
            self._count.add(texts)
        if not self._held and not _TURN.search(event):
            return event
        document = json_of(event)
        said = document if isinstance(document, dict) else {}
        if said.get("type") == "message_stop":
            self._tail = event if event.endswith(_BLANK_LINES) else event.rstrip(b"\r\n") + b"\n\n"
            self.done = True
            return b""
        if self._held and (b"data:" not in event or said.get("type") == "ping"):
            return self._keep_behind(event)
        released = self._released()
        if said.get("type") == "message_delta":
            usage = said.get("usage")
            self._take(usage)
            told = isinstance(usage, dict) and count(usage, "output_tokens") is not None
            self._reported_at = self._count.events if told else -1
            self._held = event
            return released
        self._read(said, event)
        return released + event

    def _read(self, said: dict[str, Any], event: bytes) -> None:
        """Take what is handed out at once and changes something."""
        named_error = is_named_error(event)
        index = said.get("index")
        if named_error or said.get("type") == "error" or said.get("error"):
            self.failed = self.done = True
            self.error_shown = named_error
        elif said.get("type") == "message_start" and isinstance(message := said.get("message"), dict):
            self._take(message.get("usage"))
        elif said.get("type") == "content_block_start" and type(index) is int:
            self._open[index] = None
        elif said.get("type") == "content_block_stop" and type(index) is int:
            self._open.pop(index, None)

    def _take(self, usage: object) -> None:
        """Each figure is a total so far: one that is left out stays as it was, and so does one that became less,
        because some servers say 0 at the end for what they said at the beginning."""
        if isinstance(usage, dict):
            for name in MESSAGE_USAGE_FIELDS:
                figure = count(usage, name)
                if isinstance(usage.get(name), dict):
                    self._reported[name] = usage[name]
                elif figure is not None:
                    self._reported[name] = max(figure, count(self._reported, name) or 0)
            self.usage = read_message_usage(self._reported)

    def _keep_behind(self, event: bytes) -> bytes:
        # A comment or a ping does not part the usage from the end.
        self._held_with += event
        if len(self._held_with) > MAX_EVENT_BYTES:
            raise BrokenStream("pings without end")
        return b""

    def _released(self) -> bytes:
        """The report of usage that turns out not to be the last."""
        released = self._held + self._held_with
        self._held, self._held_with = b"", bytearray()
        return released

    def _with_cost(self, cost: Mapping[str, object]) -> bytes:
        document = json_of(self._held)
        assert isinstance(document, dict)  # it was read when it came
        usage = document.get("usage")
        if not isinstance(usage, dict):
            usage = _usage_of(self.metered(complete=True))
        return _named_event({**document, "usage": {**usage, **cost}}, otherwise=self._held)


def _outputs_of(event: bytes) -> list[bytes]:
    texts = [text for found in _OUTPUT.findall(on_one_line(event)) for text in found if text]
    return texts or unread(event)


def _usage_of(tokens: Metered) -> dict[str, int]:
    return {
        "input_tokens": tokens.plain_input,
        "cache_creation_input_tokens": tokens.cache_write,
        "cache_read_input_tokens": tokens.cache_read,
        "output_tokens": tokens.output,
    }


def _named_event(document: Mapping[str, Any], otherwise: bytes = b"") -> bytes:
    event = event_of(document)
    return b"event: " + document["type"].encode() + b"\n" + event if event else otherwise
