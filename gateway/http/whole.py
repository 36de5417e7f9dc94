"""An answer that is all there, written in one piece.

aiohttp prepares, checks and writes an answer in five steps, made for answers of every kind: 15 µs. This is 4 µs.
"""

import time
from email.utils import formatdate

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter

from gateway.http.errors import headers_of


class WholeAnswer(web.StreamResponse):
    """An answer with status, head and body, as one of aiohttp's own; ``DataServer`` writes it at once.

    lines: of its head, each with its end, without control characters in between; ``headers`` come behind them.
    """

    def __init__(self, status: int, lines: str, content_type: str, body: bytes) -> None:
        super().__init__(status=status)
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
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        if "\n" in self._media_type or "\r" in self._media_type:
            raise ValueError("a content type with a line break in it")
        version = request.version
        lines = self._lines
        if self._headers:
            lines += "".join([f"{name}: {value}\r\n" for name, value in self._headers.items()])
        if not self._keep_alive:
            lines += "Connection: close\r\n"
        elif version == HttpVersion10:
            lines += "Connection: keep-alive\r\n"
        head = (
            f"HTTP/{version[0]}.{version[1]} {self._status} {self._reason}\r\n{lines}"
            f"Content-Type: {self._media_type}\r\n"
            f"Date: {_now()}\r\nContent-Length: {len(self._whole)}\r\n\r\n"
        )
        return head.encode("utf-8", "surrogateescape") + self._whole


_date = (0, "")


def _now() -> str:
    """The time as a Date header says it, written once a second."""
    global _date  # noqa: PLW0603
    second = int(time.time())
    if _date[0] != second:
        _date = second, formatdate(second, usegmt=True)
    return _date[1]
