"""The file that has the models: what it says, and its new content put in its place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.config.document import MAX_FILE_BYTES, Document, Location, Text, read_document
from gateway.config.fields import PriceUnit
from gateway.config.load import load
from gateway.config.model import GatewayConfig
from gateway.config.problem import ConfigError, Problem


class BookError(Exception):
    """The file cannot be written as it was meant to be; it is as it was."""


@dataclass(frozen=True, slots=True)
class Book:
    """The models as they stand in their file. main: gateway.yaml. file: where the models are, which may be the same.
    content: the file's, when it was read. prefix: where in it price_unit and models are. models: by name, as Text."""

    config: GatewayConfig
    main: Path
    file: Path
    content: bytes
    prefix: Location
    unit: PriceUnit
    models: Mapping[str, Mapping[str, Any]]


def open_book(path: Path) -> Book:
    """Read the configuration at path, which must be without a mistake. Raises ConfigError."""
    main = _document(path, _read(path))
    named = main.tree.get("models")
    file = path.parent / named.text if isinstance(named, Text) else path
    prefix: Location = () if isinstance(named, Text) else ("models",)
    # Loading says what is wrong with the name of the file better than reading it would.
    content = _read(file) if file.is_file() else None
    config = load(path, contents={} if content is None else {file: content})
    assert content is not None, "a configuration without mistakes names a file that is there"
    section = _section(_document(file, content), prefix)
    return Book(config, path, file, content, prefix, section["price_unit"].text, section["models"])


def written_tree(book: Book, content: bytes) -> Any:
    """All that a content of the file says, its texts as they are written. Raises ConfigError."""
    return _plain(_document(book.file, content).tree)


def replace(book: Book, content: bytes) -> None:
    """Put a new content into the file, all of it or nothing: the configuration with it must load first, and the file
    must be as it was read. Raises ConfigError and BookError."""
    load(book.main, contents={book.file: content})
    file = book.file.resolve()  # a link stays one
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        try:
            _write(unfinished, content, file.stat().st_mode & 0o7777)
            if file.read_bytes() != book.content:
                raise BookError(f"{book.file} was changed in the meantime: nothing was written; ask again")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_directory(file.parent)
    except OSError as error:
        raise BookError(f"cannot write {book.file}: {error.strerror}") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    with path.open("xb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem(str(path), 1, 1, f"cannot be read: {error.strerror}")]) from None


def _document(path: Path, content: bytes) -> Document:
    """Raises ConfigError where it cannot be parsed."""
    problems: list[Problem] = []
    document = read_document(path, os.environ, problems, {}, content)
    if document is None:
        raise ConfigError(problems)
    return document


def _section(document: Document, prefix: Location) -> Any:
    section: Any = document.tree
    for key in prefix:
        section = section[key]
    return section


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.written
