"""Changes in the text of models.yaml that leave every other character as it is: comments, order, quotes, alignment.

PyYAML says where each value stands; a new text is put there. A library that reads and writes the whole file would align
its comments and indents anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from re import compile as pattern
from typing import Any, NamedTuple

import yaml

from gateway.config.document import Location, dotted
from gateway.pricebook.book import Book, BookError, written_tree
from gateway.pricebook.difference import ModelDifference
from gateway.pricebook.offer import FIELDS

_SAFE = pattern(r"[A-Za-z0-9][A-Za-z0-9._/-]*(:[A-Za-z0-9._/-]+)*")
_NULL = "null"


def edited(book: Book, differences: Sequence[ModelDifference]) -> bytes:
    """The file's content with the differences. Raises BookError where the file is written in a way that does not let
    them be put in, and ConfigError."""
    sheet = _Sheet(book)
    for difference in differences:
        sheet.add(difference) if difference.upstream else sheet.change(difference)
    content = sheet.content()
    expected: Any = written_tree(book, book.content)
    section = expected
    for key in book.prefix:
        section = section[key]
    for difference in differences:
        _apply(section["models"], difference)
    # Whatever a file may look like: what was not meant to change must not have.
    if written_tree(book, content) != expected:
        raise BookError(f"{book.file} is written in a way that this command cannot edit: change it by hand")
    return content


def _apply(models: dict[str, Any], difference: ModelDifference) -> None:
    """The difference in the plain tree of the file."""
    if difference.upstream:
        models[difference.name] = {"upstream": difference.upstream}
    model = models[difference.name]
    if difference.tiers is not None:
        model["tiers"] = _tier_list(difference.tiers)
    for change in difference.changes:
        match change.place:
            case (str(field),):
                model[field] = change.new
            case ("image_prices", kind):
                model.setdefault("image_prices", {})[kind] = change.new
            case ("tiers", above, field) if difference.tiers is None:
                tiers = model.setdefault("tiers", [])
                tier = next((tier for tier in tiers if tier["above_input_tokens"] == str(above)), None)
                if tier is None:
                    tiers.append(tier := {"above_input_tokens": str(above)})
                tier[field] = change.new


def _tier_list(tiers: Mapping[int, Mapping[str, str]]) -> list[dict[str, str]]:
    return [{"above_input_tokens": str(above), **prices} for above, prices in tiers.items()]


class _Splice(NamedTuple):
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A mapping of the file and where it stands."""

    node: yaml.MappingNode
    location: Location


class _Sheet:
    """The file's text and what is to be put where."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._bom = book.content.startswith(b"\xef\xbb\xbf")
        self._text = book.content.decode("utf-8-sig")
        self._newline = "\r\n" if "\r\n" in self._text else "\n"
        self._splices: list[_Splice] = []
        root = yaml.compose(self._text, Loader=yaml.SafeLoader)
        assert isinstance(root, yaml.MappingNode), "the file was loaded"
        self._shared = _shared(root)
        entry = _Entry(root, ())
        for key in (*book.prefix, "models"):
            entry = self._mapping(entry, str(key))
        self._models = entry

    def content(self) -> bytes:
        """The text with all that was put in."""
        parts, done = [], 0
        for splice in sorted(self._splices, key=lambda splice: splice.start):  # those of one place in their order
            parts += [self._text[done : splice.start], splice.text]
            done = splice.end
        text = "".join([*parts, self._text[done:]])
        return text.encode("utf-8-sig" if self._bom else "utf-8")

    def change(self, difference: ModelDifference) -> None:
        """Put the changes of a model that is there."""
        model = self._mapping(self._models, difference.name)
        images: dict[str, str] = {}
        tiers: dict[int, dict[str, str]] = {}
        for change in difference.changes:
            match change.place:
                case (str(field),):
                    self._put(model, field, str(change.new), FIELDS)
                case ("image_prices", str(kind)):
                    images[kind] = str(change.new)
                case ("tiers", int(above), str(field)):
                    tiers.setdefault(above, {})[field] = str(change.new)
        if images:
            self._put_images(model, images)
        if tiers:
            self._put_tiers(model, tiers, difference.tiers)

    def add(self, difference: ModelDifference) -> None:
        """Put a new model behind the last one, written as that is."""
        fields = {"upstream": _scalar(str(difference.upstream)), **_fields(difference)}
        name = _scalar(difference.name)
        key, last = self._models.node.value[-1]
        if self._models.node.flow_style:
            self._insert(_end(last), f", {name}: {_flow(fields)}")
        elif last.flow_style:
            self._insert_line(_end(last), f"{' ' * key.start_mark.column}{name}: {_flow(fields)}")
        else:
            self._insert_line(_end(last), "")
            self._insert_line(_end(last), f"{' ' * key.start_mark.column}{name}:")
            self._insert_block(_end(last), fields, last.value[0][0].start_mark.column)

    def _put_images(self, model: _Entry, images: Mapping[str, str]) -> None:
        if _child(model.node, "image_prices") is None:
            self._put_new(model, "image_prices", {_scalar(kind): price for kind, price in images.items()}, FIELDS)
            return
        prices = self._mapping(model, "image_prices")
        for kind, price in images.items():
            self._put(prices, kind, price, ())

    def _put_tiers(
        self, model: _Entry, changed: dict[int, dict[str, str]], anew: Mapping[int, Mapping[str, str]] | None
    ) -> None:
        pair = _child(model.node, "tiers")
        if pair is None:
            self._put_new(model, "tiers", _tier_list(changed), FIELDS)
            return
        key, tiers = pair
        here = (*model.location, "tiers")
        self._check_once(tiers, here)
        if anew is not None:
            text = _block("tiers", _tier_list(anew), key.start_mark.column, self._newline)
            text = _flow({"tiers": _tier_list(anew)})[1:-1] if model.node.flow_style else text
            self._splices.append(_Splice(key.start_mark.index, _end(tiers), text.lstrip(" ")))
            return
        for index, tier in enumerate(tiers.value):
            self._check_once(tier, (*here, index))
            above = _child(tier, "above_input_tokens")
            assert above is not None, "the file was loaded"
            for field, price in changed.get(int(above[1].value), {}).items():
                self._put(_Entry(tier, (*here, index)), field, price, FIELDS)

    def _put(self, entry: _Entry, field: str, value: str, order: Sequence[str]) -> None:
        """Write a value over that of a field, or add the field."""
        pair = _child(entry.node, field)
        if pair is None:
            self._put_new(entry, _scalar(field), value, order)
            return
        node = pair[1]
        self._check_once(node, (*entry.location, field))
        quote = node.style if node.style in ("'", '"') else ""
        self._splices.append(_Splice(node.start_mark.index, node.end_mark.index, f"{quote}{value}{quote}"))

    def _put_new(self, entry: _Entry, field: str, value: Any, order: Sequence[str]) -> None:
        """Add a field behind the last of those that come before it by order; without an order behind all."""
        pairs = entry.node.value
        before = ("upstream", "above_input_tokens", *order[: order.index(field)]) if order else ()
        key, after = ([pair for pair in pairs if pair[0].value in before] or pairs)[-1]
        if entry.node.flow_style:
            self._insert(_end(after), f", {field}: {_flow(value)}")
        else:
            self._insert_block(_end(after), {field: value}, key.start_mark.column)

    def _insert(self, position: int, text: str) -> None:
        self._splices.append(_Splice(position, position, text))

    def _insert_block(self, position: int, fields: Mapping[str, Any], column: int) -> None:
        for field, value in fields.items():
            self._insert_line(position, _block(field, value, column, self._newline))

    def _insert_line(self, position: int, line: str) -> None:
        """Below the line of a position, whatever comment that ends with."""
        end = self._text.find("\n", position)
        end = len(self._text) if end < 0 else end
        if self._text[:end].endswith("\r"):
            end -= 1
        self._insert(end, self._newline + line)

    def _mapping(self, entry: _Entry, key: str) -> _Entry:
        pair = _child(entry.node, key)
        assert pair is not None and isinstance(pair[1], yaml.MappingNode), "the file was loaded"
        location = (*entry.location, key)
        self._check_once(pair[1], location)
        return _Entry(pair[1], location)

    def _check_once(self, node: yaml.Node, location: Location) -> None:
        """A change of what stands for several values would change them all."""
        if id(node) in self._shared:
            raise BookError(
                f"{dotted(location)} in {self._book.file} is shared by an anchor (&) and an alias (*): "
                "write it out where it is used, then ask again"
            )


def _shared(root: yaml.Node) -> set[int]:
    """The nodes that stand in more than one place."""
    seen: set[int] = set()
    shared: set[int] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            shared.add(id(node))
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
    return shared


def _child(node: yaml.MappingNode, name: str) -> tuple[yaml.ScalarNode, Any] | None:
    return next((pair for pair in node.value if pair[0].value == name), None)


def _end(node: yaml.Node) -> int:
    """Where the text of a value ends. PyYAML ends a block where the next thing begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.index
    return end


def _fields(difference: ModelDifference) -> dict[str, Any]:
    """The fields of a new model: figures, with its tiers and images as lists and mappings."""
    model: dict[str, Any] = {difference.name: {}}
    _apply(model, difference)
    fields = {field: value for field, value in model[difference.name].items() if field != "upstream"}
    if "image_prices" in fields:
        fields["image_prices"] = {_scalar(kind): price for kind, price in fields["image_prices"].items()}
    return fields


def _block(field: str, value: Any, column: int, newline: str) -> str:
    """A field in lines of its own; of a list or a mapping each entry in a line."""
    indent = " " * column
    if isinstance(value, str):
        return f"{indent}{field}: {value}"
    entries = (
        [f"- {_flow(one)}" for one in value] if isinstance(value, list) else [f"{k}: {v}" for k, v in value.items()]
    )
    return newline.join([f"{indent}{field}:", *(f"{indent}  {entry}" for entry in entries)])


def _flow(value: Any) -> str:
    """A value within a line."""
    if isinstance(value, list):
        return f"[{', '.join(_flow(one) for one in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(one)}' for key, one in value.items())}}}"
    return str(value)


def _scalar(text: str) -> str:
    """A text as YAML, in quotes where it could be read as something else."""
    return text if _SAFE.fullmatch(text) and text != _NULL else dumps(text, ensure_ascii=False)
