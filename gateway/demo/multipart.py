"""Reading a form with files, of which only the first bytes, the length and a hash are kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.demo.fields import MAX_BODY_BYTES
from gateway.demo.refusal import Refused

MAX_PARTS = 64
#: So much is kept of a file; a text field is no longer.
HEAD_BYTES = 256 * 1024

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class File:
    """head: the first HEAD_BYTES of it. size: in bytes. digest: a hash of all of it."""

    head: bytes
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """texts: by the name of the field, the last one's where it came twice. files: those of a name, in order."""

    texts: Mapping[str, str]
    files: Mapping[str, list[File]]

    def number(self, name: str, most: int, least: int) -> int:
        """A whole number from least, where there is none, to most. Raises Refused."""
        value = self.texts.get(name, "") or str(least)
        if not (value.isascii() and value.isdigit() and len(value) < 10 and least <= int(value) <= most):
            raise Refused(f"{name} must be an integer from {least} to {most}", name)
        return int(value)

    def is_true(self, name: str) -> bool:
        """Whether the field says true. Raises Refused."""
        value = self.texts.get(name, "").lower()
        if value not in ("", "true", "false", "1", "0"):
            raise Refused(f"{name} must be true or false", name)
        return value in ("true", "1")


async def read_form(request: web.Request) -> Form:
    """The fields and files of a multipart body of at most MAX_BODY_BYTES. Raises Refused."""
    if request.content_type != "multipart/form-data":
        raise Refused("the body must be multipart/form-data")
    texts: dict[str, str] = {}
    files: dict[str, list[File]] = {}
    size = parts = 0
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            parts += 1
            if not isinstance(part, BodyPartReader) or not part.name or not part.name.isprintable():
                raise Refused("each part of the form must be a field with a name")
            if parts > MAX_PARTS:
                raise Refused(f"the form must have at most {MAX_PARTS} parts")
            file = await _read(part, MAX_BODY_BYTES - size)
            size += file.size
            if part.filename is not None:
                files.setdefault(part.name, []).append(file)
            else:
                texts[part.name] = _as_text(part.name, file)
    except (ValueError, HttpProcessingError, web.RequestPayloadError) as error:
        raise Refused(f"the body is no form: {error!r}") from None
    return Form(texts, files)


async def _read(part: BodyPartReader, most: int) -> File:
    head, size, digest = bytearray(), 0, hashlib.sha256()
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        size += len(chunk)
        if size > most:
            raise Refused(f"the body must have at most {MAX_BODY_BYTES} bytes", status=413)
        head += chunk[: HEAD_BYTES - len(head)]
        digest.update(chunk)
    return File(bytes(head), size, digest.digest())


def _as_text(name: str, file: File) -> str:
    if file.size > HEAD_BYTES:
        raise Refused(f"a field must have at most {HEAD_BYTES} bytes", name)
    try:
        return file.head.decode()
    except UnicodeDecodeError:
        raise Refused("a field must be UTF-8", name) from None
