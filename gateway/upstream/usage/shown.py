"""What there is to read in a whole answer."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.figures import Usage

# What an answer of any API says of itself.
_NAMING = frozenset({"id", "object", "created", "model", "usage", "meta", "warnings"})


def document_of(body: bytes) -> dict[str, Any] | None:
    """A whole answer's document; None where it is not a JSON object, or an error."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) and not document.get("error") else None


def answer_of(texts: Iterable[str], usage: Usage | None, signs: int = 0) -> Answer:
    """An answer that says these texts. signs: tokens of which something else tells."""
    size = characters = 0
    for text in texts:
        characters += len(text)
        size += bytes_of(text)
    return Answer(usage, size, characters, signs=signs) if signs else Answer(usage, size, characters)


def bytes_of(text: str) -> int:
    """The length of a text as bytes."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def as_text(part: object) -> str:
    """A part of an answer as text: as it would stand in JSON, where it is none."""
    if isinstance(part, str):
        return part
    try:
        return orjson.dumps(part).decode()
    except orjson.JSONEncodeError:
        return "…"  # nested deeper than the library writes: there is something, of unknown length


def shows_else(document: Mapping[str, Any], known: Iterable[str]) -> bool:
    """Whether an answer holds anything but its name and what is known: some servers have shapes of their own."""
    return any(value for name, value in document.items() if name not in _NAMING and name not in known)
