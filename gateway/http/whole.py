"""An answer that is all there, written in one piece.

aiohttp prepares, checks and writes an answer in five steps, made for answers of every kind: 15 µs. This is 4 µs.
"""

import time
from email.utils import formatdate
from functools import lru_cache

from aiohttp import HttpVersion, HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_response import REASON_PHRASES
from multidict import CIMultiDict

from gateway.http.errors import headers_of


class WholeAnswer(web.StreamResponse):
    """An answer with status, head and body, as one of aiohttp's own; ``DataServer`` writes it at once.

    lines: of its head, each with its end, without control characters in between; ``headers`` come behind them.
    """

    def __init__(self, status: int, lines: str, content_type: str, body: bytes) -> None:
        # What aiohttp's own says of an answer without headers, by three calls for 4 k instructions.
        self._state = {}
        self._headers = CIMultiDict()
        self._status, self._reason = status, REASON_PHRASES.get(status, "")
        self._lines = lines  # not in headers: to put each into a multidict and take it out again costs 0.4 µs
        self._media_type = content_type
        self._whole = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Called by aiohttp, where it writes the answer itself."""
        self.headers.update(headers_of(self._lines))
        self.headers["Content-Type"] = self._media_type
        self.content_length = len(self._whole)
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Called by aiohttp, where it writes the answer itself."""
        await super().write_eof(self._whole)

    def written(self, request: web.BaseRequest) -> bytes:
        """The answer to request as it goes over the wire; decides whether the connection lives on. Raises ValueError
        for a content type that would not stay one."""
        message = request._message  # what the properties of request look up one by one
        if self._keep_alive is None:
            self._keep_alive = not message.should_close
        if "\n" in self._media_type or "\r" in self._media_type:
            raise ValueError("a content type with a line break in it")
        start, last = _around_lines(message.version, self._status, self._keep_alive)
        others = "".join([f"{name}: {value}\r\n" for name, value in self._headers.items()]) if self._headers else ""
        head = (
            f"{start}{self._lines}{others}{last}Content-Type: {self._media_type}\r\n"
            f"Date: {_now()}\r\nContent-Length: {len(self._whole)}\r\n\r\n"
        )
        return head.encode("utf-8", "surrogateescape") + self._whole


@lru_cache(maxsize=64)
def _around_lines(version: HttpVersion, status: int, keep_alive: bool) -> tuple[str, str]:
    """The first line of a head, and what stands behind all others of the connection."""
    connection = "" if keep_alive else "Connection: close\r\n"
    if keep_alive and version == HttpVersion10:
        connection = "Connection: keep-alive\r\n"
    return f"HTTP/{version[0]}.{version[1]} {status} {REASON_PHRASES.get(status, '')}\r\n", connection


_date = (0, "")


def _now() -> str:
    """The time as a Date header says it, written once a second."""
    global _date  # noqa: PLW0603
    second = int(time.time())
    if _date[0] != second:
        _date = second, formatdate(second, usegmt=True)
    return _date[1]
