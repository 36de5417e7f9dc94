"""What the events of a response tell: its items, their texts, and what of both was told before.

Deltas say something new. Other events repeat it, and count only for what they say beyond it: some servers tell a short
item at once.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from gateway.domain.value import value
from gateway.upstream.sse import MAX_EVENT_BYTES, BrokenStream
from gateway.upstream.usage.shown import as_text

DONE = ".done"
CALLS = ("function_call", "custom_tool_call")
_DELTA, _ADDED = ".delta", ".added"
# What an item of a type that is not known here says is all that does not just name it.
_NAMING = frozenset({"id", "type", "status", "role", "call_id"})
_KNOWN_ITEMS = (*CALLS, "message", "reasoning")
# What an item or a part takes before it says anything.
_EMPTY_BYTES = 256


@value(frozen=True, slots=True)
class Kind:
    """A kind of text in an item. stem: of its events' names. group: the item's field where it stands; index: the
    events' field that says where in that; text: the field that holds it in a part and in the event that ends it.
    part_type: what the part is called; empty where the text is no part, but the item's own field."""

    stem: str
    group: str
    index: str
    text: str
    part_type: str


_KINDS = (
    Kind("response.output_text", "content", "content_index", "text", "output_text"),
    Kind("response.refusal", "content", "content_index", "refusal", "refusal"),
    Kind("response.reasoning_text", "content", "content_index", "text", "reasoning_text"),
    Kind("response.reasoning_summary_text", "summary", "summary_index", "text", "summary_text"),
    Kind("response.function_call_arguments", "arguments", "", "arguments", ""),
    Kind("response.custom_tool_call_input", "input", "", "input", ""),
)
_BY_STEM = {kind.stem: kind for kind in _KINDS}
_BY_PART_TYPE = {kind.part_type: kind for kind in _KINDS if kind.part_type}
PART_STEMS = {"response.content_part": "content_index", "response.reasoning_summary_part": "summary_index"}

# Where a text stands in an item: the field, and the place in its list.
Place: TypeAlias = tuple[str, int]
_WHOLE: Place = ("", 0)


@dataclass(slots=True)
class Part:
    """A text as far as it was told. announced, ended, closed: whether the events that open its part, end its text and
    close its part have come. document: the part as it was announced."""

    kind: Kind | None = None
    texts: list[str] = field(default_factory=list)
    characters: int = 0
    announced: bool = False
    ended: bool = False
    closed: bool = False
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Item:
    """An item as far as it was told. document: as it was announced, or, once it is closed, as it was told whole.
    characters: of all its texts. kept_bytes: about what is kept of it."""

    index: int
    kept_bytes: int
    document: dict[str, Any] | None = None
    document_bytes: int = 0
    closed: bool = False
    characters: int = 0
    parts: dict[Place, Part] = field(default_factory=dict)
    parts_bytes: int = 0

    def add(self, place: Place, text: str) -> None:
        """Take a text that is new."""
        if text:
            part = self._part(place)
            part.texts.append(text)
            part.characters += len(text)
            self.characters += len(text)
            self._keep_parts(len(text))

    def take(self, document: dict[str, Any], size: int, *, closed: bool) -> None:
        """Take the item as an event of size bytes tells it."""
        self.kept_bytes += size - self.document_bytes
        self.document, self.document_bytes, self.closed = document, size, closed

    def mark(self, document: dict[str, Any], size: int) -> None:
        """Note which of the parts were opened and ended by an event of size bytes."""
        stem, _, ending = document["type"].rpartition(".")
        if stem in _BY_STEM:
            told = _BY_STEM[stem]
            part = self._part((told.group, _index_of(document, told.index)))
            part.kind, part.ended = told, part.ended or ending == "done"
        elif stem in PART_STEMS and isinstance(document.get("part"), dict):
            index = PART_STEMS[stem]
            part = self._part((index.removesuffix("_index"), _index_of(document, index)))
            part.kind = part.kind or _BY_PART_TYPE.get(str(document["part"].get("type")))
            part.document, part.announced, part.closed = document["part"], True, ending == "done"
            self._keep_parts(size)
        if self.closed:
            self.parts.clear()  # the document has them all
            self._keep_parts(-self.parts_bytes)

    def _part(self, place: Place) -> Part:
        if place not in self.parts:
            self.parts[place] = Part()
            self._keep_parts(_EMPTY_BYTES + len(place[0]))
        return self.parts[place]

    def _keep_parts(self, size: int) -> None:
        self.parts_bytes += size
        self.kept_bytes += size


class Told:
    """All items of a response as far as they were told.

    frame: the response as it was announced. characters: of all texts. What is kept of it all is limited, because the
    event that ends the response has to hold it.
    """

    def __init__(self) -> None:
        self._items: dict[int | str, Item] = {}
        self._kept_bytes = 0
        self._frame_bytes = 0
        self.frame: dict[str, Any] = {}
        self.characters = 0

    @property
    def announced(self) -> list[Item]:
        """The items that have a document."""
        return [item for item in self._items.values() if item.document is not None]

    def begin(self, frame: dict[str, Any], size: int) -> None:
        """Take the response as an event of size bytes announces it. Raises BrokenStream where it is all too much."""
        self.frame, self._frame_bytes = frame, size
        self._check()

    def beyond(self, output: object) -> str:
        """What the items of a whole response say beyond all that was told on the way."""
        return "".join(texts_of(output))[self.characters :]

    def news(self, document: dict[str, Any]) -> list[tuple[Place, str]]:
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

    def note(self, document: dict[str, Any], size: int) -> None:
        """Take an event of size bytes. Raises BrokenStream where it is all too much."""
        kind, news = document["type"], self.news(document)
        if not news and kind != "response.output_item.added":
            return
        item = self._item_of(document)
        self._kept_bytes -= item.kept_bytes
        if type(index := document.get("output_index")) is int:
            item.index = index
        for place, text in news:
            item.add(place, text)
            self.characters += len(text)
        if kind.startswith("response.output_item.") and isinstance(document.get("item"), dict):
            item.take(document["item"], size, closed=kind.endswith(DONE))
        item.mark(document, size)
        self._kept_bytes += item.kept_bytes
        self._check()

    def _item_of(self, document: dict[str, Any]) -> Item:
        key = _key_of(document)
        if key not in self._items:
            size = _EMPTY_BYTES + (len(key) if isinstance(key, str) else 0)
            self._items[key] = Item(len(self._items), size)
            self._kept_bytes += size
        return self._items[key]

    def _check(self) -> None:
        if self._frame_bytes + self._kept_bytes > MAX_EVENT_BYTES:
            raise BrokenStream(f"an answer of more than {MAX_EVENT_BYTES} bytes")


def texts_of(output: object) -> Iterator[str]:
    """All that the items of a response's output say."""
    for item in output if isinstance(output, list) else []:
        for _, text in _texts_in(item):
            yield text


def _texts_in(item: object) -> Iterator[tuple[Place, str]]:
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
    return as_text(value) if value else ""


def _told_by(document: dict[str, Any]) -> Iterator[tuple[Place, str, bool]]:
    """What an event says of one item: where, the text, and whether it is new, and not all that there is so far."""
    stem, dot, ending = document["type"].rpartition(".")
    ending = dot + ending
    kind = _BY_STEM.get(stem)
    if ending == _DELTA:
        place = (kind.group, _index_of(document, kind.index)) if kind else (stem, 0)
        yield place, _written(document.get("delta")), True
    elif ending not in (_ADDED, DONE):
        return
    elif kind:
        yield (kind.group, _index_of(document, kind.index)), _written(document.get(kind.text)), False
    elif stem in PART_STEMS:
        group = PART_STEMS[stem].removesuffix("_index")
        yield (group, _index_of(document, PART_STEMS[stem])), _text_in(document.get("part")), False
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


def as_json(text: str) -> bytes:
    """A text as it stands in JSON, without its quotes."""
    try:
        return orjson.dumps(text)[1:-1]
    except orjson.JSONEncodeError:
        return json.dumps(text).encode()[1:-1]
