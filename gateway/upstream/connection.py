"""One HTTP/1.1 connection to an upstream, with one request at a time; llhttp reads the answers that are not plain.

A small request and its answer cost 26 µs of CPU here and 110 µs with aiohttp's client; a piece of a stream 9 µs here,
of which 8 are the loop's and the system's, and 17 µs there.
"""

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

from gateway.upstream.answer import READ_AHEAD_BYTES, UpstreamAnswer
from gateway.upstream.errors import HungUp, UpstreamError, UpstreamUnavailable
from gateway.upstream.plain import MOST_HEAD_BYTES, PlainAnswer, read_plain

# The longest stretch of an answer that is neither head nor body.
_MOST_USELESS_BYTES = MOST_HEAD_BYTES
# Up to here a copy is cheaper than a second buffer in the system call.
_ONE_WRITE_BYTES = 2**14
_WITHOUT_BODY = frozenset({204, 304})


class Pieces(tuple[bytes | memoryview, ...]):
    """A body in memory that is written piece by piece: to join 400 kB takes 45 µs."""

    __slots__ = ()

    @property
    def size_bytes(self) -> int:
        """The length of all of it."""
        return sum(map(len, self))

    def __bytes__(self) -> bytes:
        return b"".join(self)


def merged(first: bytes, second: bytes) -> bytes | Pieces:
    """Two JSON objects, neither empty, as a body that is one; joined where that is cheaper."""
    if len(first) + len(second) <= _ONE_WRITE_BYTES:
        return b"%b,%b" % (first[:-1], second[1:])
    return Pieces((first[:-1], b",", memoryview(second)[1:]))


class Connection(asyncio.Protocol):
    """An open connection, until ``on_lost`` is called. on_free: called whenever it can take the next request."""

    __slots__ = (
        "_answer", "_arrived", "_fields", "_head_only", "_heard", "_left", "_loop", "_lost", "_parser", "_paused",
        "_reusable", "_timer", "_timer_at", "_transport", "_until_close", "_uploading", "_useless", "_whole",
        "_writable", "freed_at", "on_body", "on_free", "on_header", "on_lost",
    )  # fmt: skip

    def __init__(self, on_free: "Callable[[Connection], None]", on_lost: "Callable[[Connection], None]") -> None:
        self._loop = asyncio.get_running_loop()
        self.on_free = on_free
        self.on_lost = on_lost
        self.freed_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: UpstreamAnswer | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._writable: asyncio.Future[None] | None = None
        self._lost = self._paused = self._uploading = False
        self._fields: dict[bytes, bytes] = {}
        self._arrived: list[bytes] = []
        # The parser calls these for each header and each piece: straight into C, no function of ours in between.
        self.on_header = self._fields.__setitem__
        self.on_body = self._arrived.append

    # --- one request --------------------------------------------------------------------------------------------------

    def ask(
        self,
        head: bytes,
        body: bytes | Pieces | None,
        *,
        idle_s: float,
        deadline: float,
        head_only: bool = False,
        uploading: bool = False,
    ) -> UpstreamAnswer:
        """Send a request; the answer, still without its head. uploading: its body will be written by ``write``.

        deadline: by the loop's clock.
        """
        assert self._answer is None
        assert self._transport is not None
        self._heard = self._whole = self._reusable = self._until_close = False
        self._head_only = head_only
        self._uploading = uploading
        self._useless = 0
        self._answer = answer = UpstreamAnswer(self._loop, self, idle_s, deadline)
        if self._timer is None or self._timer_at > answer.heard_at + idle_s or self._timer_at > deadline:
            self._watch(answer.due(answer.heard_at))
        if type(body) is bytes and len(body) <= _ONE_WRITE_BYTES:
            self._transport.write(head + body)
        elif not body:
            self._transport.write(head)
        else:
            self._transport.writelines((head, *body) if isinstance(body, Pieces) else (head, body))
        return answer

    async def write(self, block: bytes) -> None:
        """A piece of an upload; returns when the next one may come. Raises HungUp once the connection is closed."""
        if self._transport is None or self._transport.is_closing():
            raise HungUp("the upstream takes no more of the request")
        self._transport.write(block)
        if self._writable is not None:
            await self._writable

    def uploaded(self) -> None:
        """All of the upload was written."""
        self._uploading = False
        if self._answer is not None:
            self._answer.heard_at = self._loop.time()

    def fail(self, error: UpstreamError) -> None:
        """End the answer with this error, and close."""
        answer = self._answer
        self.drop()
        if answer is not None:
            answer.end(error)

    def drop(self) -> None:
        """Close at once."""
        self._answer = None
        if self._transport is not None and not self._lost:
            self._transport.abort()

    def resume(self) -> None:
        """Read on."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    @property
    def closed(self) -> bool:
        """Whether it takes no request any more."""
        return self._lost or self._transport is None or self._transport.is_closing()

    # --- the watchdog -------------------------------------------------------------------------------------------------

    def _watch(self, due: float) -> None:
        # A timer costs 2 µs, so there is one for the connection's whole life: it looks, and is set again for when
        # the answer of that moment may be late. Only a shorter limit than before moves it.
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        answer = self._answer
        if answer is None or self._transport is None:
            return
        now = self._loop.time()
        if self._uploading or self._transport.get_write_buffer_size():
            answer.heard_at = now  # nobody answers what was not sent yet
        error = answer.late(now)
        if error is not None:
            self.fail(error)
        else:
            self._watch(answer.due(now))

    # --- called by the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop: hand on what there is of the body."""
        answer = self._answer
        if answer is None:
            self.drop()  # nobody has asked: it would be taken for the next answer
            return
        if not self._heard:
            self._heard = True
            plain = None if self._head_only else read_plain(data)
            if plain is not None:
                self._begin_plain(answer, plain)
                return
            self._begin_to_parse()
        answer.heard_at = self._loop.time()
        if self._parser is None:
            self._go_on_plain(answer, data)
            return
        try:
            if answer.status:
                self._feed(data)
            else:
                self._feed_head(answer, data)
        except httptools.HttpParserError as error:
            self._reusable = False
            if not self._whole:
                self.fail(UpstreamUnavailable(f"the answer cannot be read: {error.__context__ or error}"))
                return
        if self._arrived:
            self._useless = 0
            block = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
            self._arrived.clear()
            if not answer.take(block) and not self._whole:
                self._pause()
        if self._whole:
            self._let_go()
            answer.end()
        elif self._useless > _MOST_USELESS_BYTES:
            self.fail(UpstreamUnavailable(f"the answer has more than {_MOST_USELESS_BYTES} bytes that are no body"))

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def eof_received(self) -> None:
        """Called by the event loop; it closes the connection."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._lost = True
        self._parser = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume_writing()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end(self._end_of(answer, exc))
        self.on_lost(self)

    def _end_of(self, answer: UpstreamAnswer, exc: Exception | None) -> UpstreamError | None:
        """The error in an answer that the connection's end has ended; None where that is how it says its end."""
        if answer.status and self._until_close and exc is None:
            return None
        if not self._heard:
            return HungUp(f"the upstream closed the connection without an answer{_because(exc)}")
        return UpstreamUnavailable(f"the upstream closed the connection before its answer was whole{_because(exc)}")

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _let_go(self) -> None:
        """Take the next request, if it can: the answer is whole."""
        assert self._transport is not None
        self._answer = self._parser = None
        if self._paused:
            self.resume()
        if (
            self._reusable
            and not self._uploading
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        ):
            self.on_free(self)
        else:
            self.drop()

    # --- answers that need no parser ----------------------------------------------------------------------------------

    def _begin_plain(self, answer: UpstreamAnswer, plain: PlainAnswer) -> None:
        _, _, size_bytes, body = plain
        self._reusable, self._left = True, size_bytes - len(body)
        if not self._left:
            self._let_go()
        else:
            answer.heard_at = self._loop.time()
            if len(body) >= READ_AHEAD_BYTES:
                self._pause()
        answer.arrive(plain)

    def _go_on_plain(self, answer: UpstreamAnswer, data: bytes) -> None:
        left = self._left = self._left - len(data)
        if left < 0:  # what is too much closes the connection
            data, self._reusable = data[:left], False
        wanted = answer.take(data)
        if left <= 0:
            self._let_go()
            answer.end()
        elif not wanted:
            self._pause()

    # --- called by the parser -----------------------------------------------------------------------------------------

    def _begin_to_parse(self) -> None:
        self._fields.clear()  # it holds the last answer's headers and trailers
        # Each answer has a parser of its own, for 0.3 µs: nothing of one answer can be taken for a part of the next.
        self._parser = httptools.HttpResponseParser(self)
        # As lenient as other clients are, where it cannot move the end of an answer.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True)

    def _feed(self, data: bytes) -> None:
        self._useless += len(data)
        assert self._parser is not None
        self._parser.feed_data(data)

    def _feed_head(self, answer: UpstreamAnswer, data: bytes) -> None:
        room = MOST_HEAD_BYTES - self._useless
        self._feed(data[:room])
        if answer.status:
            self._useless = 0
            if len(data) > room and not self._whole:
                self._feed(data[room:])
            elif len(data) > room:
                self._reusable = False
        elif len(data) > room:
            raise httptools.HttpParserError(f"its head has more than {MOST_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._whole:
            raise ValueError("more came than an answer")

    def on_headers_complete(self) -> None:
        """Called by the parser, also for the heads that come before the answer's own."""
        parser, answer = self._parser, self._answer
        assert parser is not None
        assert answer is not None
        status = parser.get_status_code()
        if status < 200:
            self._fields.clear()
            if status == 101:
                raise ValueError("it changes to another protocol")
            return
        fields = {name.lower(): value for name, value in self._fields.items()}
        coding = fields.get(b"transfer-encoding")
        if coding is not None and coding.rstrip(b" \t").lower() != b"chunked":
            raise ValueError("its Transfer-Encoding is not known")
        self._until_close = coding is None and b"content-length" not in fields and status not in _WITHOUT_BODY
        answer.begin(status, fields)
        if self._head_only:
            self._whole = True
            raise ValueError("the parser cannot know that there is no body")  # the connection is given up with it

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._answer is not None and self._answer.status:
            assert self._parser is not None
            self._whole = True
            self._reusable = self._parser.should_keep_alive()
        elif self._arrived:
            raise ValueError("an interim answer has a body")


def _because(exc: Exception | None) -> str:
    return f": {exc}" if exc is not None else ""
