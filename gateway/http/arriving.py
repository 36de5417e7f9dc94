"""Requests that come in like the one before on their connection.

A client says the same head again and again, with another length of the body at most. To parse it anew, and to put the
body through a reader, takes 45,000 instructions of a request's 730,000; to see that it is the same head takes a few
thousand. What is not the same to the byte is parsed by aiohttp.
"""

import asyncio
from typing import Any

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EmptyStreamReader
from multidict import CIMultiDict, CIMultiDictProxy

#: A larger body goes through aiohttp's reader, which holds little of it.
MOST_BYTES = 2**20
#: A longer head is not kept for the next request: each idle connection would hold it.
MOST_HEAD_BYTES = 2**13

_LENGTH = b"\r\ncontent-length:"
_MOST_DIGITS = 7


class Body(EmptyStreamReader):
    """A body of known length, to be read once and whole, by those who ask for any of it.

    aiohttp's own reader hands it on as it comes, and has the client wait while nobody takes it.
    """

    __slots__ = ("_failure", "_missing", "_pieces", "_taker")

    def __init__(self, begun: bytes, missing: int) -> None:
        """begun: what has come of it. missing: the bytes that have not."""
        self._pieces: list[bytes | memoryview] = [
            begun
        ]  # without the class's own, which sets what only ``readchunk`` reads
        self._missing = missing
        self._taker: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def take(self, data: bytes | memoryview) -> bytes | memoryview:
        """Take more of it; what stands behind it."""
        missing = self._missing
        self._pieces.append(data if len(data) <= missing else data[:missing])
        self._missing = max(0, missing - len(data))
        if not self._missing and self._taker is not None:
            self._wake(self._taker)
        return data[missing:]

    def is_eof(self) -> bool:
        """Whether all of it has come."""
        return not self._missing

    def exception(self) -> BaseException | None:
        """Why the rest does not come."""
        return self._failure

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """Called by aiohttp: the rest does not come."""
        self._failure = exc
        if self._taker is not None:
            self._wake(self._taker)

    def read_nowait(self, n: int = -1) -> bytes:
        """What has come and was not read yet."""
        pieces, self._pieces = self._pieces, []
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    async def readany(self) -> bytes:
        """All of it, once it has come; nothing afterwards. Raises what ``set_exception`` was told."""
        while self._missing and self._failure is None:
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        if self._missing and self._failure is not None:
            raise self._failure
        return self.read_nowait()

    async def read(self, n: int = -1) -> bytes:
        """The same."""
        return await self.readany()

    def _wake(self, taker: "asyncio.Future[None]") -> None:
        self._taker = None
        if not taker.done():
            taker.set_result(None)


class Head:
    """The head of a connection's requests, all but the length of the body: a POST of JSON with a body of known length,
    which the parser has taken."""

    __slots__ = ("_after", "_before", "_last", "raw")

    def __init__(self, before: bytes, digits: bytes, after: bytes, message: RawRequestMessage) -> None:
        """before, after: what stands around the digits of its content-length. message: what the parser made of it."""
        self._before, self._after = before, after
        #: All of it, as it came last, and what ``begins`` said of that.
        self.raw = before + digits + after
        self._last = message, len(self.raw), int(digits)

    @classmethod
    def of(cls, head: bytes, message: RawRequestMessage) -> "Head | None":
        """The head that a message was made of; None where it is not of that kind."""
        headers = message.headers
        if (
            message.method != "POST"
            or message.should_close
            or message.compression is not None
            or "Expect" in headers
            or not headers.get("Content-Type", "").startswith("application/json")
        ):
            return None
        at = head.lower().find(_LENGTH)
        if at < 0:
            return None
        before_value = head[at + len(_LENGTH) :]
        at += len(_LENGTH) + len(before_value) - len(before_value.lstrip(b" \t"))
        end = head.find(b"\r", at)
        digits = head[at:end]
        return cls(head[:at], digits, head[end:], message) if _is_length(digits) else None

    def begins(self, data: bytes) -> "tuple[RawRequestMessage, int, int] | None":
        """Whether data begins with this head: the message that the parser would make of that, where the body begins and
        its length. None for a body of no length or a length of more than 7 digits."""
        if data.startswith(self.raw):
            return self._last
        before, after = self._before, self._after
        start = len(before)
        if not data.startswith(before):
            return None
        end = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        digits = data[start:end]
        if end < 0 or not _is_length(digits) or not data.startswith(after, end):
            return None
        message = _with_length(self._last[0], digits)
        self.raw = before + digits + after
        self._last = message, end + len(after), int(digits)
        return self._last


def size_of(data: bytes, message: Any) -> tuple[int, int] | None:
    """How long the head is that data begins with, and the whole request: what the parser takes of it. None where that
    is not certain. message: the only one that the parser made of data."""
    if getattr(message, "upgrade", True) or message.chunked:  # what no request could be made of has neither
        return None
    if "Transfer-Encoding" in message.headers:
        return None
    length = message.headers.get("Content-Length", "0")
    end = data.find(b"\r\n\r\n") + 4
    head = data[:end]
    # Each line ends in one way and gave one header: so it is this message's head, and ends where the parser saw it end.
    lines = len(message.raw_headers) + 2
    if not head.startswith(message.method.encode() + b" ") or not (head.count(b"\r\n") == head.count(b"\n") == lines):
        return None
    if not (length.isascii() and length.isdigit()):
        return None
    return end, end + int(length)


def _is_length(digits: bytes) -> bool:
    return digits.isdigit() and digits[:1] != b"0" and len(digits) <= _MOST_DIGITS


def _with_length(message: RawRequestMessage, digits: bytes) -> RawRequestMessage:
    headers = CIMultiDict(message.headers)
    headers["Content-Length"] = digits.decode()
    raw = tuple([(name, digits if name.lower() == b"content-length" else value) for name, value in message.raw_headers])
    return RawRequestMessage(
        message.method,
        message.path,
        message.version,
        CIMultiDictProxy(headers),
        raw,
        message.should_close,
        message.compression,
        message.upgrade,
        message.chunked,
        message.url,
    )
