"""Streams of the Responses API: items and their parts are opened, told in deltas and closed; the last event holds the
whole response and its usage.

Every event is read, because a stream that the gateway ends early must close all that it opened. What deltas say is
output. Other events repeat it, and count only for what they say beyond it: some servers tell a short item at once.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import MAX_EVENT_BYTES, BrokenStream, EventStream, event_of, json_of
from gateway.upstream.usage import billed, billed_without_usage, read_response_usage

_FINAL = ("response.completed", "response.incomplete")
_FRAMES = ("response.queued", "response.created", "response.in_progress")
_DELTA, _ADDED, _DONE = ".delta", ".added", ".done"
# What an item of a type that is not known here says is all that does not just name it.
_NAMING = frozenset({"id", "type", "status", "role", "call_id"})
_CALLS = ("function_call", "custom_tool_call")
_KNOWN_ITEMS = (*_CALLS, "message", "reasoning")


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of text in an item. stem: of its events' names. group: the item's field where it stands; index: the
    events' field that says where in that; text: the field that holds it in a part and in the event that ends it.
    part_type: what the part is called; empty where the text is no part, but the item's own field."""

    stem: str
    group: str
    index: str
    text: str
    part_type: str


_KINDS = (
    _Kind("response.output_text", "content", "content_index", "text", "output_text"),
    _Kind("response.refusal", "content", "content_index", "refusal", "refusal"),
    _Kind("response.reasoning_text", "content", "content_index", "text", "reasoning_text"),
    _Kind("response.reasoning_summary_text", "summary", "summary_index", "text", "summary_text"),
    _Kind("response.function_call_arguments", "arguments", "", "arguments", ""),
    _Kind("response.custom_tool_call_input", "input", "", "input", ""),
)
_BY_STEM = {kind.stem: kind for kind in _KINDS}
_BY_PART_TYPE = {kind.part_type: kind for kind in _KINDS if kind.part_type}
_PART_STEMS = {"response.content_part": "content_index", "response.reasoning_summary_part": "summary_index"}

# Where a text stands in an item: the field, and the place in its list.
_Place: TypeAlias = tuple[str, int]
_WHOLE: _Place = ("", 0)


@dataclass(slots=True)
class _Part:
    """A text as far as it was told. announced, ended, closed: whether the events that open its part, end its text and
    close its part have come. document: the part as it was announced."""

    kind: _Kind | None = None
    texts: list[str] = field(default_factory=list)
    characters: int = 0
    announced: bool = False
    ended: bool = False
    closed: bool = False
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Item:
    """An item as far as it was told. document: as it was announced, or, once it is closed, as it was told whole.
    characters: of all its texts."""

    index: int
    document: dict[str, Any] | None = None
    closed: bool = False
    characters: int = 0
    parts: dict[_Place, _Part] = field(default_factory=dict)

    def part(self, place: _Place) -> _Part:
        return self.parts.setdefault(place, _Part())


class ResponseStream(EventStream):
    """Events of one response. The client always gets its usage."""

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._items: dict[int | str, _Item] = {}
        self._characters = 0
        self._number = -1
        self._frame: dict[str, Any] = {}
        self._before_last = b""
        self._last: dict[str, Any] | None = None
        self._last_event = b""
        self._read_event: tuple[bytes, dict[str, Any] | None] = (b"", None)

    def cut_short(self, quota: Mapping[str, object]) -> None:
        """An end for every open part and item, and ``response.incomplete`` with what was said so far."""
        self._waiting = []
        told = [item for item in self._items.values() if item.document is not None]
        self._before_last = b"".join(self._event(event) for item in told for event in _closing_of(item))
        response = {
            **{"id": "", "object": "response", "created_at": 0, "model": self._ask.model},
            **self._frame,
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [item.document for item in told],
            "usage": _usage_of(self.metered(complete=False)),
        }
        self._last = self._numbered({"type": "response.incomplete", "response": response, "quota": quota})
        self._last_event = _named_event(self._last)
        self.done = True

    def closing(self, cost: Mapping[str, object] | None) -> bytes:
        """The last event."""
        last = self._last
        if last is None or cost is None or not isinstance(response := last.get("response"), dict):
            return self._before_last + self._last_event
        usage = response.get("usage")
        if not isinstance(usage, dict):
            usage = _usage_of(self.metered(complete=True))
        with_cost = {**last, "response": {**response, "usage": {**usage, **cost}}}
        return self._before_last + _named_event(with_cost, otherwise=self._last_event)

    def metered(self, *, complete: bool) -> Metered:
        """By the last event's usage, else by what was counted."""
        if not self.has_output and not (self.usage and self.usage.unseen):
            return Metered()
        if self.usage is None:
            return billed_without_usage(self._ask, self._bound, self._count.billable)
        return billed(self.usage, self._ask, self._bound)

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
            return []
        if document["type"] in _FINAL:
            return self._never_told(document)
        return [_as_json(text) for _, text in self._news(document) if text]

    def _follow(self, event: bytes, texts: list[bytes]) -> bytes:
        if self.done:
            return b""
        document = self._read(event)
        if document is None:
            return b"" if _is_done_mark(event) else event
        self._count.add(texts)
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
            self._frame = document["response"]
        self._note(kind, document)
        return event

    def _read(self, event: bytes) -> dict[str, Any] | None:
        """The event's document, which has a type; None where it has none. Each is asked for twice."""
        if self._read_event[0] != event:
            document = json_of(event) or _with_half_characters(event)
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
        whole = "".join(texts_of(response.get("output")) if isinstance(response, dict) else ())
        return [_as_json(whole[self._characters :])] if len(whole) > self._characters else []

    def _news(self, document: dict[str, Any]) -> list[tuple[_Place, str]]:
        """What an event says of an item that was not told before, and where."""
        item = self._items.get(_key_of(document))
        if document["type"] == "response.output_item.done":
            whole = "".join(texts_of([document.get("item")]))
            return [(_WHOLE, whole[item.characters if item else 0 :])]
        news = []
        for place, text, is_delta in _told_by(document):
            part = item.parts.get(place) if item else None
            news.append((place, text if is_delta or part is None else text[part.characters :]))
        return news

    def _note(self, kind: str, document: dict[str, Any]) -> None:
        news = self._news(document)
        if not news and kind != "response.output_item.added":
            return
        item = self._items.setdefault(_key_of(document), _Item(len(self._items)))
        if type(index := document.get("output_index")) is int:
            item.index = index
        for place, text in news:
            self._add(item, place, text)
        if kind.startswith("response.output_item.") and isinstance(document.get("item"), dict):
            item.document, item.closed = document["item"], kind.endswith(_DONE)
        if item.closed:
            item.parts.clear()  # the document has them all
        _mark(item, kind, document)

    def _add(self, item: _Item, place: _Place, text: str) -> None:
        if not text:
            return
        part = item.part(place)
        part.texts.append(text)
        part.characters += len(text)
        item.characters += len(text)
        self._characters += len(text)
        if self._characters > MAX_EVENT_BYTES:  # the last event has to hold it all
            raise BrokenStream(f"an answer of more than {MAX_EVENT_BYTES} characters")

    def _event(self, document: dict[str, Any]) -> bytes:
        return _named_event(self._numbered(document))

    def _numbered(self, document: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        return {**document, "sequence_number": self._number}


def texts_of(output: object) -> Iterator[str]:
    """All that the items of a response's output say."""
    for item in output if isinstance(output, list) else []:
        for _, text in _texts_in(item):
            yield text


def _texts_in(item: object) -> Iterator[tuple[_Place, str]]:
    """What an item says, and where."""
    if not isinstance(item, dict):
        return
    if item.get("type") not in _KNOWN_ITEMS:
        yield ("", 0), _written({name: value for name, value in item.items() if name not in _NAMING and value})
        return
    for name in ("name", "arguments", "input"):
        if value := item.get(name):
            yield (name, 0), _written(value)
    for name in ("content", "summary"):
        parts = item.get(name)
        for index, part in enumerate(parts if isinstance(parts, list) else []):
            yield (name, index), _text_in(part)


def _text_in(part: object) -> str:
    if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind in _BY_PART_TYPE:
        return _written(part.get(_BY_PART_TYPE[kind].text) or "")
    return _written(part)


def _written(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode() if value else ""
    except orjson.JSONEncodeError:
        return "…"  # nested deeper than the library writes: there is something, of unknown length


def _told_by(document: dict[str, Any]) -> Iterator[tuple[_Place, str, bool]]:
    """What an event says of one item: where, the text, and whether it is new, and not all that there is so far."""
    stem, dot, ending = document["type"].rpartition(".")
    ending = dot + ending
    kind = _BY_STEM.get(stem)
    if ending == _DELTA:
        place = (kind.group, _index_of(document, kind.index)) if kind else (stem, 0)
        yield place, _written(document.get("delta")), True
    elif ending not in (_ADDED, _DONE):
        return
    elif kind:
        yield (kind.group, _index_of(document, kind.index)), _written(document.get(kind.text)), False
    elif stem in _PART_STEMS:
        group = _PART_STEMS[stem].removesuffix("_index")
        yield (group, _index_of(document, _PART_STEMS[stem])), _text_in(document.get("part")), False
    elif stem == "response.output_item":
        for place, text in _texts_in(document.get("item")):
            yield place, text, False


def _index_of(document: dict[str, Any], name: str) -> int:
    index = document.get(name)
    return index if type(index) is int else 0


def _key_of(document: dict[str, Any]) -> int | str:
    """What tells an item from others: its place, or its id for servers that do not say places."""
    index = document.get("output_index")
    if type(index) is int:
        return index
    item = document.get("item")
    name = item.get("id") if isinstance(item, dict) else document.get("item_id")
    return name if isinstance(name, str) else ""


def _mark(item: _Item, kind: str, document: dict[str, Any]) -> None:
    """Note which of an item's parts were opened and ended by an event."""
    stem, _, ending = kind.rpartition(".")
    if stem in _BY_STEM:
        told = _BY_STEM[stem]
        part = item.part((told.group, _index_of(document, told.index)))
        part.kind, part.ended = told, part.ended or ending == "done"
    elif stem in _PART_STEMS and isinstance(document.get("part"), dict):
        index = _PART_STEMS[stem]
        part = item.part((index.removesuffix("_index"), _index_of(document, index)))
        part.kind = part.kind or _BY_PART_TYPE.get(str(document["part"].get("type")))
        part.document, part.announced, part.closed = document["part"], True, ending == "done"


def _closing_of(item: _Item) -> Iterator[dict[str, Any]]:
    """The events that end an item here; its document is then what was told of it. A call gets none: clients run what is
    done, whatever its status, and half a call may be a very different one."""
    if item.closed or item.document is None:
        return
    whole: dict[str, Any] = {**item.document, "status": "incomplete"}
    where = {"item_id": item.document.get("id", ""), "output_index": item.index}
    lists: dict[str, list[dict[str, Any]]] = {}
    for (group, index), part in sorted(item.parts.items(), key=lambda entry: entry[0][1]):
        kind, text = part.kind, _joined(part.texts)
        if kind is None:
            continue
        if not kind.part_type:
            whole[group] = text
            continue
        document = {**({"annotations": []} if kind.part_type == "output_text" else {}), **part.document}
        document.update({"type": kind.part_type, kind.text: text})
        lists.setdefault(group, []).append(document)
        yield from _closing_of_part(part, kind, {**where, kind.index: index}, document, text)
    item.document, item.closed = {**whole, **lists}, True
    if item.document.get("type") not in _CALLS:
        yield {"type": "response.output_item.done", "output_index": item.index, "item": item.document}


def _closing_of_part(
    part: _Part, kind: _Kind, where: dict[str, Any], document: dict[str, Any], text: str
) -> Iterator[dict[str, Any]]:
    if not part.ended:
        logprobs: dict[str, Any] = {"logprobs": []} if kind.part_type == "output_text" else {}
        yield {"type": kind.stem + _DONE, **where, kind.text: text, **logprobs}
    if part.announced and not part.closed:
        stem = next(stem for stem, index in _PART_STEMS.items() if index == kind.index)
        yield {"type": stem + _DONE, **where, "part": document}


def _usage_of(tokens: Metered) -> dict[str, Any]:
    return {
        "input_tokens": tokens.input,
        "input_tokens_details": {"cached_tokens": tokens.cache_read},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.input + tokens.output,
    }


def _named_event(document: Mapping[str, Any], otherwise: bytes = b"") -> bytes:
    event = event_of(document) or otherwise or _slowly_written(document)
    return event if event.startswith(b"event:") else b"event: " + document["type"].encode() + b"\n" + event


def _slowly_written(document: Mapping[str, Any]) -> bytes:
    """An event of what the quick library does not write: half a character, or something nested deeply. Raises
    BrokenStream where it is nested too deeply altogether."""
    try:
        return b"data: " + json.dumps(document).encode() + b"\n\n"
    except RecursionError:
        raise BrokenStream("an answer that is nested too deeply") from None


def _is_done_mark(event: bytes) -> bool:
    """Whether it is the mark that some servers send at the end: clients would take it for one, whatever came before."""
    return any(line.startswith(b"data:") and line[5:].strip() == b"[DONE]" for line in event.splitlines())


def _with_half_characters(event: bytes) -> object:
    """The document of an event that ends or begins in the middle of a character, which some servers do."""
    if b"\\ud" not in event and b"\\uD" not in event:
        return None
    try:
        return json.loads(b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:")))
    except (ValueError, RecursionError):
        return None


def _joined(texts: list[str]) -> str:
    """Pieces of a text as one, with the characters that were cut in two made whole."""
    return "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as_json(text: str) -> bytes:
    """A text as it stands in JSON, without its quotes."""
    try:
        return orjson.dumps(text)[1:-1]
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()[1:-1]
