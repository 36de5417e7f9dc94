"""Forms: read from a client with the files put aside on disk, and written anew for the upstream.

A file is not held in memory, and it is not sent on before all of the form has come: the fields that say what it will
cost may stand behind it. What is priced is what is forwarded: the upstream gets the fields as they were understood
here, in a form of the gateway's own making.
"""

import asyncio
import hashlib
import logging
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, BinaryIO, cast

from aiohttp import (
    BadContentDispositionHeader,
    BadContentDispositionParam,
    BodyPartReader,
    MultipartReader,
    StreamReader,
    web,
)
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_exceptions import HTTPException

from gateway.apis.form import HEAD_BYTES, File, Form
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.http.quote import invite
from gateway.upstream.client import Upload

#: Parts of a form, lines of all that is no content, and bytes of all its text fields.
MAX_PARTS = 64
MAX_LINES = 4096
MAX_TEXT_BYTES = 2**20
#: Of the largest uploads, how many fit on the disk at once.
UPLOADS_AT_ONCE = 16
#: How long an upload may take.
UPLOAD_S = 900.0

_CHUNK_BYTES = 2**18
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}(\[[A-Za-z0-9_]{0,64}\]){0,4}")
_UNQUOTABLE = re.compile(r'[\x00-\x1f\x7f"\\\ud800-\udfff]')
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}(; ?[a-z]+=[A-Za-z0-9,._-]{1,64})?")

# Each would be written to stderr and remembered for ever, with whatever a client wrote in it.
for _warning in (BadContentDispositionHeader, BadContentDispositionParam):
    warnings.filterwarnings("ignore", category=_warning)

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The form is not taken; failure says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class UploadRoom:
    """What all forms of this process together may take of the disk: credits are looked at only once a form is there, so
    nothing else bounds how many come at once. UPLOADS_AT_ONCE of the largest fit."""

    def __init__(self) -> None:
        self._taken_bytes = 0

    def take(self, size_bytes: int, largest_bytes: int) -> None:
        """Raises _Refused where there is no room left."""
        if self._taken_bytes + size_bytes > UPLOADS_AT_ONCE * largest_bytes:
            log.error("an upload cannot be put aside: %d bytes of others are there", self._taken_bytes)
            raise _Refused(errors.no_room_for_upload())
        self._taken_bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        """Give room back."""
        self._taken_bytes -= size_bytes


async def read_form(request: web.BaseRequest, most_bytes: int, room: UploadRoom) -> Form | Failure:
    """The request's form, or why it is not taken. Whoever gets a form closes it."""
    if not request.headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
        return errors.not_a_form()
    if failure := await invite(request, most_bytes):
        return failure
    reading = _Reading(most_bytes, room)
    try:
        async with asyncio.timeout(UPLOAD_S):
            await reading.read(request)
        return reading.form()
    except BaseException as error:
        reading.close()
        if failure := _failure_of(error):
            return failure
        raise


def _failure_of(error: BaseException) -> Failure | None:
    """What to tell the client of what kept its form from being read; None for what is not about the form."""
    match error:
        case _Refused():
            return error.failure
        case TimeoutError():
            return errors.body_too_slow()
        case OSError() if not isinstance(error, ConnectionError):
            log.error("an upload cannot be put aside: %s", error)
            return errors.no_room_for_upload()
        case web.RequestPayloadError() | HttpProcessingError() | HTTPException():
            return errors.broken_body(_shown(error))
        case ValueError() | RuntimeError() | AssertionError():  # what aiohttp raises for a form that is none
            return errors.broken_body(_shown(error) or "it is no form")
    return None


def _shown(error: BaseException) -> str:
    """What it says, which may hold bytes of the client's that are no text."""
    return str(error).encode(errors="backslashreplace").decode()


class _Counted:
    """A body as MultipartReader reads it, whose bytes and lines are counted, wherever in the form they stand."""

    def __init__(self, content: StreamReader, count: Callable[[int], None]) -> None:
        self._content = content
        self._count = count
        self._lines_left = MAX_LINES
        self.at_eof = content.at_eof

    async def readline(self, **limits: Any) -> bytes:
        line = await self._content.readline(**limits)
        self._count(len(line))
        self._lines_left -= 1
        if not self._lines_left:
            raise ValueError(f"it has more than {MAX_LINES} lines besides its content")
        return line

    async def read(self, size: int) -> bytes:
        piece = await self._content.read(size)
        self._count(len(piece))
        return piece

    def unread_data(self, piece: bytes) -> None:
        self._count(-len(piece))
        self._content.unread_data(piece)


class _Reading:
    """One form on its way in."""

    def __init__(self, most_bytes: int, room: UploadRoom) -> None:
        self._room = room
        self._put_aside_bytes = 0
        self._left_bytes = most_bytes
        self._most_bytes = most_bytes
        self._text_bytes = 0
        self._fields: list[tuple[str, str]] = []
        self._files: list[File] = []
        self._digest = hashlib.sha256()

    def form(self) -> Form:
        """All that was read."""
        leave = partial(self._room.leave, self._put_aside_bytes)
        return Form(tuple(self._fields), tuple(self._files), self._digest.hexdigest(), leave)

    def close(self) -> None:
        """Give the room on disk back."""
        self.form().close()

    async def read(self, request: web.BaseRequest) -> None:
        """Read to the form's end."""
        reader = MultipartReader(request.headers, cast(StreamReader, _Counted(request.content, self._count)))
        count = 0
        while (part := await reader.next()) is not None:
            count += 1
            if count > MAX_PARTS:
                raise ValueError(f"it has more than {MAX_PARTS} parts")
            if not isinstance(part, BodyPartReader):
                raise ValueError("a part of it is a form itself")
            await self._take(part)
        async for rest in request.content.iter_any():  # what stands behind the form's end
            self._count(len(rest))

    async def _take(self, part: BodyPartReader) -> None:
        name = part.name or ""
        if not _NAME.fullmatch(name):
            raise ValueError(f"a part of it has no name, or one that is none: {name[:64]!r}")
        encoded = part.headers.get("Content-Encoding") or part.headers.get("Content-Transfer-Encoding") or "binary"
        if encoded.lower() not in ("binary", "7bit", "8bit", "identity"):
            raise ValueError(f"the part {name!r} is encoded, which is not supported here")
        self._digest.update(f"\n{name}\n{part.filename or ''}\n".encode(errors="replace"))
        if part.filename is None:
            self._fields.append((name, await self._text_of(part)))
        else:
            await self._put_aside(part, name, part.filename)

    async def _text_of(self, part: BodyPartReader) -> str:
        pieces = []
        while piece := await part.read_chunk(_CHUNK_BYTES):
            self._text_bytes += len(piece)
            if self._text_bytes > MAX_TEXT_BYTES:
                raise ValueError(f"its text fields have more than {MAX_TEXT_BYTES} bytes")
            self._digest.update(piece)
            pieces.append(piece)
        return b"".join(pieces).decode()

    async def _put_aside(self, part: BodyPartReader, name: str, filename: str) -> None:
        # Without a name on disk: whatever becomes of this process, nothing of it stays.
        content: BinaryIO = await asyncio.to_thread(tempfile.TemporaryFile)
        size, head = 0, b""
        try:
            while piece := await part.read_chunk(_CHUNK_BYTES):
                self._digest.update(piece)
                head = head + piece[: HEAD_BYTES - len(head)] if len(head) < HEAD_BYTES else head
                size += len(piece)
                self._room.take(len(piece), self._most_bytes)
                self._put_aside_bytes += len(piece)
                await asyncio.to_thread(content.write, piece)
            await asyncio.to_thread(content.flush)
        except BaseException:
            content.close()
            raise
        media_type = part.headers.get("Content-Type", "")
        if not _MEDIA_TYPE.fullmatch(media_type):
            media_type = "application/octet-stream"
        self._files.append(File(name, filename, media_type, size, head, content))

    def _count(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise _Refused(errors.body_too_large(self._most_bytes))


def written(form: Form, model: str) -> Upload:
    """The form as it is sent to the upstream, which calls the model so. It can be sent more than once."""
    boundary = f"qg-{secrets.token_hex(16)}"
    pieces: list[bytes | File] = []
    for name, value in form.fields:
        shown = model if name == "model" else value
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{shown}\r\n'
        pieces.append(head.encode())
    for file in form.files:
        filename = _UNQUOTABLE.sub("_", file.filename)[:255]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{file.name}"; filename="{filename}"\r\n'
        pieces += [f"{head}Content-Type: {file.content_type}\r\n\r\n".encode(), file, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    size = sum(piece.size_bytes if isinstance(piece, File) else len(piece) for piece in pieces)
    return Upload(f"multipart/form-data; boundary={boundary}", size, lambda: _chunks(pieces))


async def _chunks(pieces: list[bytes | File]) -> AsyncIterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
            continue
        offset = 0
        while chunk := await asyncio.to_thread(_read_at, piece.content, offset):
            offset += len(chunk)
            yield chunk


def _read_at(content: BinaryIO, offset: int) -> bytes:
    # Without moving the file's own position: a first upstream may still be reading while a fallback is sent the form.
    return os.pread(content.fileno(), _CHUNK_BYTES, offset)
