"""Streams of the Responses API: items and their parts are opened, told in deltas and closed; the last event holds the
whole response and its usage.

Every event is read, because a stream that the gateway ends early must close all that it opened. What deltas say is
output. Other events repeat it, and count only for what they say beyond it: some servers tell a short item at once.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.apis.responses_closing import closing_of, named_event, usage_of
from gateway.apis.responses_items import Told, as_json
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import EventStream, json_of, unread
from gateway.upstream.usage.billing import billed, billed_without_usage
from gateway.upstream.usage.responses import read_response_usage

_FINAL = ("response.completed", "response.incomplete")
_FRAMES = ("response.queued", "response.created", "response.in_progress")


class ResponseStream(EventStream):
    """Events of one response. The client always gets its usage."""

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._told = Told()
        self._number = -1
        self._before_last = b""
        self._last: dict[str, Any] | None = None
        self._last_event = b""
        self._read_event: tuple[bytes, dict[str, Any] | None] = (b"", None)

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """An end for every open part and item, and ``response.incomplete`` with what was said so far."""
        self._waiting = []
        told = self._told.announced
        self._before_last = b"".join(self._event(event) for item in told for event in closing_of(item))
        response = {
            **{"id": "", "object": "response", "created_at": 0, "model": self._ask.model},
            **self._told.frame,
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [item.document for item in told],
            "usage": usage_of(self.metered(complete=False)),
        }
        self._last = self._numbered({"type": "response.incomplete", "response": response, "quota": quota})
        self._last_event = named_event(self._last)
        self.done = True

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The last event."""
        last = self._last
        if last is None or cost is None or not isinstance(response := last.get("response"), dict):
            return self._before_last + self._last_event
        usage = response.get("usage")
        if not isinstance(usage, dict):
            usage = usage_of(self.metered(complete=True))
        with_cost = {**last, "response": {**response, "usage": {**usage, **cost}}}
        return self._before_last + named_event(with_cost, otherwise=self._last_event)

    def metered(self, *, complete: bool) -> Metered:
        """By the last event's usage, else by what was counted."""
        if not self.payable:
            return Metered()
        if self.usage is None:
            return billed_without_usage(self._ask, self._bound, self._count.billable)
        least = 0 if self.usage.output_tokens else self._count.events  # some count nothing of what they say
        return billed(self.usage, self._ask, self._bound, least)

    def error_event(self, error: bytes) -> bytes:
        """An ``error`` event, flat as the API has it, and with the error itself, which SDKs look for in any stream."""
        body = orjson.loads(error)
        said = {name: body["error"].get(name) for name in ("code", "message", "param")}
        return self._event({**body, **said, "type": "error"})

    def _is_last(self, event: bytes) -> bool:
        return False  # a last event without its blank line is read like any other

    def _needs_a_look(self, block: bytes) -> bool:
        return True

    def _outputs(self, block: bytes) -> list[bytes]:
        document = self._read(block)
        if document is None:
            return unread(block)
        if document["type"] in _FINAL:
            return self._never_told(document)
        return [as_json(text) for _, text in self._told.news(document) if text]

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        if self.done:
            return b""
        document = self._read(event)
        self._count.add(texts)
        if document is None:
            return b"" if _is_done_mark(event) else event
        number = document.get("sequence_number")
        self._number = number if type(number) is int else self._number + 1
        kind = document["type"]
        if kind in _FINAL:
            self._end(document, event)
            return b""
        if kind in ("response.failed", "error") or document.get("error") or document.get("object") == "error":
            self.failed = self.done = True
            self.error_shown = kind in ("response.failed", "error") or bool(document.get("error"))
            return event
        if kind in _FRAMES and isinstance(document.get("response"), dict):
            self._told.begin(document["response"], len(event))
        self._told.note(document, len(event))
        return event

    def _read(self, event: bytes) -> dict[str, Any] | None:
        """The event's document, which has a type; None where it has none. Each is asked for twice."""
        if self._read_event[0] != event:
            document = json_of(event)
            if isinstance(document, dict):
                kind = document.get("type")
                self._read_event = event, document if isinstance(kind, str) else {**document, "type": ""}
            else:
                self._read_event = event, None
        return self._read_event[1]

    def _end(self, document: dict[str, Any], event: bytes) -> None:
        response = document.get("response")
        self.usage = read_response_usage(response.get("usage")) if isinstance(response, dict) else None
        self._last, self._last_event = document, event.rstrip(b"\r\n") + b"\n\n"
        self.done = True

    def _never_told(self, document: dict[str, Any]) -> list[bytes]:
        """What the whole response says beyond all that was told on the way."""
        response = document.get("response")
        text = self._told.beyond(response.get("output")) if isinstance(response, dict) else ""
        return [as_json(text)] if text else []

    def _event(self, document: dict[str, Any]) -> bytes:
        return named_event(self._numbered(document))

    def _numbered(self, document: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        return {**document, "sequence_number": self._number}


def _is_done_mark(event: bytes) -> bool:
    """Whether it is the mark that some servers send at the end: clients would take it for one, whatever came before."""
    return any(line.startswith(b"data:") and line[5:].strip() == b"[DONE]" for line in event.splitlines())
