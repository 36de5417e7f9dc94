"""A request's body in ``multipart/form-data``, as the endpoints see it: text fields, and files that stay on disk."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

import orjson

from gateway.domain.request import InvalidRequest
from gateway.domain.value import value

#: What is kept of a file's beginning, to see how long its audio is.
HEAD_BYTES = 4096


@value(frozen=True, slots=True)
class File:
    """One file of a form. name: of its field. head: its first HEAD_BYTES. content: all of it, open for reading."""

    name: str
    filename: str
    content_type: str
    size_bytes: int
    head: bytes
    content: BinaryIO


@value(frozen=True, slots=True)
class Form:
    """fields: in the order in which they came, names as they were written. digest: SHA-256 of all of it, hex. leave:
    called when the files' room on disk is given back."""

    fields: tuple[tuple[str, str], ...]
    files: tuple[File, ...]
    digest: str
    leave: Callable[[], None] = lambda: None

    def document(self, typed: Collection[str]) -> dict[str, Any]:
        """The fields as if they had come in JSON. typed: those that are numbers or true and false. A name with brackets
        (``image[]``, ``chunking_strategy[type]``) is a part of the field before them, a list of parts
        then; a file's field holds a list of files.

        Raises InvalidRequest for a field that is given twice or cannot be read: which of two counts would be the
        upstream's guess.
        """
        document: dict[str, Any] = {}
        for written, text in self.fields:
            name, bracket, _ = written.partition("[")
            if bracket:
                document.setdefault(name, [])
                if not isinstance(document[name], list):
                    raise _twice(name)
                document[name].append(text)
            elif name in document:
                raise _twice(name)
            else:
                document[name] = _typed(name, text) if name in typed else text
        for file in self.files:
            name = file.name.partition("[")[0]
            others = document.setdefault(name, [])
            if not isinstance(others, list) or not all(isinstance(other, File) for other in others):
                raise _twice(name)
            others.append(file)
        return document

    def close(self) -> None:
        """Give the files' room on disk back."""
        for file in self.files:
            file.content.close()
        self.leave()


def files_of(body: Mapping[str, Any], name: str, most: int) -> list[File]:
    """The files in a field, at most so many; empty where there are none. Raises InvalidRequest."""
    files = body.get(name) or []
    if not isinstance(files, list) or not all(isinstance(file, File) for file in files):
        raise InvalidRequest(f"{name!r} must be a file", name)
    if len(files) > most:
        raise InvalidRequest(f"{name!r} must be at most {most} files", name)
    return files


def _typed(name: str, value: str) -> object:
    try:
        read = orjson.loads(value)
    except orjson.JSONDecodeError:
        read = None
    if isinstance(read, (bool, int, float)):
        return read
    raise InvalidRequest(f"{name!r} must be a number, or true or false", name)


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name[:64]!r} is given twice", name[:64])
