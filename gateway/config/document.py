"""One YAML file as plain values that still know their line and column.

Every scalar stays the text that was written: YAML would make a float of a price and an octal number of a port.
``${NAME}`` is replaced here, after parsing, so that no variable can change the structure of the file.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from gateway.config.problem import Problem

MAX_FILE_BYTES = 2**20
#: Aliases can make a small file stand for billions of values, or for a value inside itself.
MAX_VALUES = 100_000
MAX_DEPTH = 20

#: Stands for the digest of a file that cannot be read.
UNREADABLE = ""

#: Where a value is in its file: the keys and list indexes that lead to it.
Location = tuple[str | int, ...]

_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


@dataclass(frozen=True, slots=True, repr=False)
class Text:
    """A scalar. text: after ``${NAME}`` was replaced. written: as in the file, the only form fit for messages."""

    text: str
    written: str

    def __repr__(self) -> str:
        return "Text(***)"


@dataclass(frozen=True, slots=True)
class _Spot:
    key: tuple[int, int]
    value: tuple[int, int]


@dataclass(slots=True)
class Document:
    """A parsed file and the mistakes found in it so far.

    sections: the keys of the file's outermost mapping below which there are mistakes; an empty one for the mapping
    itself.
    """

    file: str
    problems: list[Problem]
    tree: dict[str, Any] = field(default_factory=dict)
    spots: dict[Location, _Spot] = field(default_factory=dict)
    bad: set[Location] = field(default_factory=set)
    sections: set[str] = field(default_factory=set)

    def report(self, location: Location, sentence: str, *, at_key: bool = False) -> None:
        """Note a mistake at a value (or at its key), unless one was noted there or around it before."""
        if any(location[:length] in self.bad for length in range(len(location) + 1)):
            return
        self.bad.add(location)
        spot = next(self.spots[location[:n]] for n in range(len(location), -1, -1) if location[:n] in self.spots)
        self.note(location, spot.key if at_key else spot.value, sentence)

    def note(self, location: Location, position: tuple[int, int], sentence: str) -> None:
        """Note a mistake at a line and column, whatever else was noted there."""
        self.problems.append(Problem(self.file, *position, sentence))
        self.sections.add(str(location[0]) if location else "")


def dotted(location: Location) -> str:
    """A location as people write it, such as ``plans.free.allowance[1]``, on one line and of bounded length."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in location)
    return "".join(parts).removeprefix(".")


def quoted(text: str) -> str:
    """A written text for a message: in quotes, on one line, at most 60 characters."""
    return f"'{_printable(text)}'"


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:59]}…"
    return "".join(character if character.isprintable() else "?" for character in short)


def read_document(
    path: Path,
    environ: Mapping[str, str],
    problems: list[Problem],
    files: MutableMapping[Path, str],
    content: bytes | None = None,
) -> Document | None:
    """Read and parse a file, and note its digest in files. None when it cannot be parsed at all; the reason is then in
    problems. content: what is looked at instead of what is in the file."""
    document = Document(str(path), problems)
    files[path] = UNREADABLE
    try:
        content = _of_size(_content(path) if content is None else content)
        files[path] = digest(content)
        root = _compose(_decode(content))
        document.tree = _Converter(document, environ).mapping(root, ())
    except _Unusable as error:
        problems.append(Problem(document.file, error.line, error.column, str(error)))
        return None
    return document


def digest(content: bytes) -> str:
    """What tells one content of a file from another."""
    return sha256(content).hexdigest()


class _Unusable(Exception):
    """Why a file cannot be parsed at all, and where."""

    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(message)
        self.line, self.column = line, column


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _Unusable(1, 1, f"cannot be read: {error.strerror}") from None


def _of_size(content: bytes) -> bytes:
    if len(content) > MAX_FILE_BYTES:
        raise _Unusable(1, 1, "is larger than 1 MiB: split it or check that it is the right file")
    return content


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = _position(content[: error.start].decode("utf-8", "replace"))
    raise _Unusable(*position, "is not UTF-8 text: save the file as UTF-8")


def _compose(text: str) -> yaml.MappingNode:
    # The errors are raised again outside of their handlers: PyYAML's own hold excerpts of the file.
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        unusable = _Unusable(*_position(text[: error.position]), "holds a control character: YAML allows none")
    except yaml.MarkedYAMLError as error:
        unusable = _syntax(error)
    except RecursionError:
        unusable = _Unusable(1, 1, f"is nested more than {MAX_DEPTH} levels deep")
    else:
        if isinstance(root, yaml.MappingNode):
            return root
        position, what = (_mark(root), "must be a mapping") if root else ((1, 1), "is empty")
        unusable = _Unusable(*position, f"{what}: write `key: value` lines")
    raise unusable


def _position(before: str) -> tuple[int, int]:
    lines = before.split("\n")
    return len(lines), len(lines[-1]) + 1


def _syntax(error: yaml.MarkedYAMLError) -> _Unusable:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    if error.problem == "but found another document":
        return _Unusable(line, column, "begins a second document: a configuration file is one, so remove the ---")
    # PyYAML quotes the names of aliases, anchors and tags; a secret that starts with * or ! would be one of them.
    where = f"{error.context}{error.problem}"
    quotes_the_file = isinstance(error, yaml.composer.ComposerError) or "tag" in where or "scanning an alias" in where
    if quotes_the_file or not error.problem:
        return _Unusable(line, column, "is not valid YAML: put quotes around values that start with *, & or !")
    return _Unusable(line, column, f"is not valid YAML: {error.problem}")


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


class _Converter:
    """Turns nodes into dicts, lists and Text, noting where each one is."""

    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self.document = document
        self.environ = environ
        self.values = 0

    def mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        """The keys of a mapping, in order; of a repeated key the first."""
        self.document.spots.setdefault(location, _Spot(_mark(node), _mark(node)))
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _PLAIN_TAGS:
                self._report_key(key_node, location)
                continue
            key = key_node.value
            here = (*location, key)
            if key in result:
                first = self.document.spots[here].key[0]
                message = f"{dotted(here)} is written twice, first on line {first}: remove one"
                self.document.note(here, _mark(key_node), message)
                continue
            self.document.spots[here] = _Spot(_mark(key_node), _mark(value_node))
            result[key] = self.value(value_node, here)
        return result

    def _report_key(self, node: yaml.Node, location: Location) -> None:
        where = f" in {dotted(location)}" if location else ""
        message = f"a key{where} is not plain text: merge keys (<<), tags and nested keys are not supported"
        self.document.note(location, _mark(node), message)

    def value(self, node: yaml.Node, location: Location) -> Any:
        """A dict, a list or a Text."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Unusable(*_mark(node), f"holds more than {MAX_VALUES} values, counting each use of an alias")
        if len(location) > MAX_DEPTH:
            raise _Unusable(*_mark(node), f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, location)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*location, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of nodes"
        return self.scalar(node, location)

    def _item(self, node: yaml.Node, location: Location) -> Any:
        self.document.spots[location] = _Spot(_mark(node), _mark(node))
        return self.value(node, location)

    def scalar(self, node: yaml.ScalarNode, location: Location) -> Text:
        """The text with its ``${NAME}`` replaced."""
        if node.tag not in _PLAIN_TAGS:
            self.document.report(
                location, f"{dotted(location)} has a YAML tag: put quotes around values that start with !"
            )
        if node.style is None and node.value in ("~", "null"):
            return Text("", node.value)
        return Text(_REFERENCE.sub(lambda match: self._replacement(match, location), node.value), node.value)

    def _replacement(self, match: re.Match[str], location: Location) -> str:
        name, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name is None:
            self.document.report(
                location,
                f"{dotted(location)} has a ${{ that is neither ${{NAME}} nor ${{NAME:-default}}: "
                "write $${ for a literal ${",
            )
            return ""
        value = self.environ.get(name)
        if value is None and default is None:
            self.document.report(
                location,
                f"{dotted(location)} needs the environment variable {name}, which is not set: "
                f"set it or write ${{{name}:-default}}",
            )
        # As in a shell, :- also replaces a variable that is set but empty.
        return value or default or ""
