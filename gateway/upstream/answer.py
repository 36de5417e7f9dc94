"""An upstream's answer: what its reader waits for, and until when."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

from multidict import CIMultiDict

from gateway.upstream.decoding import Decoder, decoder_for
from gateway.upstream.errors import DeadlinePassed, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from gateway.upstream.plain import PlainAnswer, fields_of

#: What is read ahead of a client that is slow to read; what arrives at once may be more.
READ_AHEAD_BYTES = 2**16
#: The loop's clock ticks in milliseconds, and timers may come half a tick early.
_TICK_S = 0.001


#: Takes a piece of a body at once, or says that it does not; never waits, never raises.
Taker = Callable[[bytes], bool]


class Line(Protocol):
    """The connection that an answer comes over."""

    def resume(self) -> None:
        """Read on, after what was read ahead is used up."""

    def drop(self) -> None:
        """Close at once."""


class UpstreamAnswer:
    """An answer whose head has come, or is waited for. One reader at a time.

    Made by the connection, which calls ``begin`` or ``arrive``, then ``take`` and ``end``; status is 0 until then.
    """

    __slots__ = (
        "_deadline", "_decoder", "_ended", "_error", "_fields", "_headers", "_held", "_idle_s", "_line", "_loop",
        "_media_type", "_most_bytes", "_pieces", "_plain_head", "_taker", "_waiter", "heard_at", "status",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, line: Line, idle_s: float, deadline: float) -> None:
        self._loop = loop
        self._line: Line | None = line
        self._idle_s = idle_s
        self._deadline = deadline
        self.status = 0
        #: By the loop's clock, when the upstream last sent something, or the reader began to wait.
        self.heard_at = loop.time()
        self._fields: Mapping[bytes, bytes] = {}
        self._plain_head = b""
        self._media_type: bytes | None = None
        self._headers: CIMultiDict[str] | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._most_bytes = -1
        self._decoder: Decoder | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._taker: Taker | None = None
        self._error: UpstreamError | None = None
        self._ended = False

    # --- for who reads it ---------------------------------------------------------------------------------------------

    @property
    def headers(self) -> CIMultiDict[str]:
        """Of a header that came more than once, the last."""
        if self._headers is None:
            fields = fields_of(self._plain_head) if self._plain_head else self._fields.items()
            self._headers = CIMultiDict()
            for name, value in fields:
                self._headers[_text(name)] = _text(value)
        return self._headers

    @property
    def content_type(self) -> str:
        """Its media type alone, in lower case."""
        if self._media_type is None:
            return "application/octet-stream"
        return _text(self._media_type.partition(b";")[0].strip().lower())

    @property
    def content_type_header(self) -> str:
        """Its Content-Type as it came, or that of JSON."""
        return "application/json" if self._media_type is None else _text(self._media_type)

    def abandon(self) -> None:
        """Close the connection, which tells the upstream to stop; nothing more can be read."""
        if not self._ended:
            self._pieces.clear()
            self._cut(UpstreamUnavailable("the answer was given up"))

    async def read(self, taker: Taker | None = None) -> bytes:
        """All of the body that has come since the last time; waits where that is nothing. b"" at its end.

        taker: gets what comes meanwhile as it comes. The reader is woken with the first piece that it does not take, as
        with any of a body that is packed. Raises UpstreamError.
        """
        if self._decoder is not None:
            return await self._read_packed(self._decoder)
        if not self._pieces and not self._ended:
            self._taker = taker
            try:
                await self._more()
            finally:
                self._taker = None
        return self._block()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises UpstreamError."""
        while block := await self.read():
            yield block

    def body_at_hand(self, most_bytes: int) -> bytes | None:
        """What ``body`` gives, where all of it has come in one piece and is not packed, as most have; else None."""
        if not self._ended or self._error is not None or self._decoder is not None:
            return None
        return self._pieces.pop() if len(self._pieces) == 1 and self._held <= most_bytes else None

    async def body(self, most_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError, also for one that is larger than most_bytes."""
        if self._decoder is None:
            # It is woken once, by the end or by a byte too much, and not for every piece.
            self._most_bytes = most_bytes
            if self._line is not None:
                self._line.resume()
            if not self._ended and self._held <= most_bytes:
                await self._more()
            parts, size = self._pieces, self._held
        else:
            parts, size = [], 0
            while size <= most_bytes and (block := await self.read()):
                parts.append(block)
                size += len(block)
        if size > most_bytes:
            self.abandon()
            raise UpstreamUnavailable(f"the answer has more than {most_bytes} bytes")
        if self._error is not None:
            raise self._error
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return body

    async def head(self) -> None:
        """Wait for the head. Raises UpstreamError."""
        if not self.status and not self._ended:
            await self._more()
        if not self.status:
            assert self._error is not None
            raise self._error
        encoding = self._fields.get(b"content-encoding")
        if encoding is not None:
            self._decoder = decoder_for(_text(encoding))

    async def _read_packed(self, decoder: Decoder) -> bytes:
        while True:
            if decoder.hungry:
                if not self._pieces and not self._ended:
                    await self._more()
                packed = self._block()
                if not packed:
                    decoder.end()
                    return b""
                decoder.feed(packed)
            if block := decoder.unpack():
                return block

    def _block(self) -> bytes:
        """What has come and was not read; b"" at the end. Raises UpstreamError where there is no more."""
        pieces = self._pieces
        if not pieces:
            if self._error is not None:
                raise self._error
            return b""
        block = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._held >= READ_AHEAD_BYTES and self._line is not None:
            self._line.resume()
        self._held = 0
        return block

    def _more(self) -> Awaitable[None]:
        """To be waited for by the reader: done when something has come."""
        # Not a coroutine of its own, which each wait would enter and leave.
        now = self._loop.time()
        self._waiter = waiter = self._loop.create_future()
        if now >= self._deadline:
            self._cut(_too_late())
        self.heard_at = now
        return waiter

    def _cut(self, error: UpstreamError) -> None:
        line = self._line
        self.end(error)
        if line is not None:
            line.drop()

    # --- for the connection -------------------------------------------------------------------------------------------

    def begin(self, status: int, fields: Mapping[bytes, bytes]) -> None:
        """The head has come. fields: by their names in lower case, with the blanks that came behind them."""
        self.status = status
        self._fields = fields
        self._media_type = fields.get(b"content-type")
        self._wake()

    def arrive(self, plain: PlainAnswer) -> None:
        """A plain head has come, with all of its body or the beginning: its reader is woken once for both."""
        self.status = 200
        self._plain_head, self._media_type, size_bytes, body = plain
        if body:
            self._pieces.append(body)
            self._held = len(body)
        if self._held == size_bytes:
            self._ended, self._line = True, None
        self._wake()

    def take(self, block: bytes) -> bool:
        """A part of the body has come; whether more is wanted now."""
        taker = self._taker
        # What is taken here needs no future, no turn of the loop and no task: a third of what an event cost.
        if taker is not None and self._awaited and taker(block):
            return True
        self._pieces.append(block)
        self._held += len(block)
        if self._most_bytes < 0:
            self._wake()
            return self._held < READ_AHEAD_BYTES
        if self._held > self._most_bytes:
            self._wake()
        return True

    def end(self, error: UpstreamError | None = None) -> None:
        """The body is at its end, or will not come to it. From now on the connection is none of the answer's."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._line = None
        self._wake()

    def due(self, now: float) -> float:
        """When to look again whether it is late, by the loop's clock."""
        if self._awaited:
            return min(self.heard_at + self._idle_s, self._deadline)
        # Nobody waits yet, or the client is slow to read: the upstream's clock stands still.
        return min(now + self._idle_s, self._deadline) if now < self._deadline else now + self._idle_s

    def late(self, now: float) -> UpstreamError | None:
        """The error if its reader has waited too long."""
        if not self._awaited:
            return None
        if now + _TICK_S > self._deadline:
            return _too_late()
        if now + _TICK_S > self.heard_at + self._idle_s:
            return UpstreamTimeout("nothing came in time")
        return None

    @property
    def _awaited(self) -> bool:
        """Whether its reader waits, and was not woken yet."""
        return self._waiter is not None and not self._waiter.done()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _too_late() -> DeadlinePassed:
    return DeadlinePassed("the answer took longer than total_timeout")


def _text(raw: bytes) -> str:
    return raw.rstrip(b" \t").decode("utf-8", "surrogateescape")
