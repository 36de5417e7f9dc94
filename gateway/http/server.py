"""The data listener's side of connections, as far as it is not aiohttp's own."""

import asyncio
import contextlib
import logging
import secrets
import socket
from http import HTTPStatus
from typing import Any

from aiohttp import web
from aiohttp.http_writer import StreamWriter

from gateway.http import errors
from gateway.http.arriving import MOST_BYTES, MOST_HEAD_BYTES, Body, Head, size_of
from gateway.http.proxy import Proxy
from gateway.http.whole import WholeAnswer

#: A client that takes nothing for so long is gone, and what waits for it is dropped.
CLIENT_STALL_MS = 60_000

_SILENT = logging.Logger("aiohttp.access", logging.CRITICAL)  # the gateway writes a line of its own per request


class DataServer(web.Server):
    """Gives the proxy what comes in."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy.handle, handler_cancellation=True)

    def __call__(self) -> web.RequestHandler:
        """A new connection."""
        return _Connection(self)


class _Connection(web.RequestHandler):
    """A client's connection.

    Requests whose head is that of one before, which was answered with a 200, are taken past the parser; whatever else
    comes goes through it, and once it is not certain where in a request it stands, all that follows.
    """

    __slots__ = ("_body", "_head", "_owed", "_parsed_head")

    def __init__(self, server: "DataServer") -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), access_log=_SILENT)
        self._head: Head | None = None
        #: The head that the parser has taken last, and the message that it made of it.
        self._parsed_head: tuple[bytes, Any] | None = None
        #: What the parser is still to get of the request that it is in, in bytes; None where that is not certain.
        self._owed: int | None = 0
        #: The body that is still to come, of a request that went past the parser.
        self._body: Body | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel end the connection of a client that takes nothing: no await may be waiting for it any more."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # only Linux has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CLIENT_STALL_MS)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop: take a request that begins as one before did, or have it parsed."""
        if self._body is not None:
            self._take_body(self._body, data)
            return
        head = self._head
        if head is not None and self._owed == 0 and not self._messages and not self._request_in_progress:
            begun = head.begins(data)
            if begun is not None and begun[2] <= MOST_BYTES and not self._force_close and not self._close:
                self._begin(data, *begun)
                return
        self._parse(data)

    def _begin(self, data: bytes, message: Any, start: int, length: int) -> None:
        missing = start + length - len(data)
        if missing == 0:
            self._queue(message, Body(data[start:], 0))
        else:
            self._body = body = Body(b"", length)
            self._queue(message, body)
            self._take_body(body, memoryview(data)[start:])  # of a large one, not to copy the first 200 kB

    def _take_body(self, body: Body, data: bytes | memoryview) -> None:
        behind = body.take(data)
        if body.is_eof():
            self._body = None
            if behind:
                self._parse(bytes(behind))

    def _queue(self, message: Any, body: Body) -> None:
        """What aiohttp does with what its parser has made."""
        self._request_count += 1
        self._messages.append((message, body))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _parse(self, data: bytes) -> None:
        owed, queued = self._owed, len(self._messages)
        super().data_received(data)
        if not owed:
            if owed == 0 and data:
                self._owed = self._owed_after(data, queued)
        elif owed >= len(data):
            self._owed = owed - len(data)
        else:
            self._owed = None

    def _owed_after(self, data: bytes, queued: int) -> int | None:
        """What the parser is still to get of the request that data began; it has made the queued messages before."""
        if len(self._messages) != queued + 1:
            return None
        message = self._messages[-1][0]
        sizes = size_of(data, message)
        if sizes is None or sizes[1] < len(data):
            return None
        if sizes[0] <= MOST_HEAD_BYTES:
            self._parsed_head = data[: sizes[0]], message
        return sizes[1] - len(data)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on, if that was paused: aiohttp asks for it whenever a body is read, and feeds its parser anew: 3 µs."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    async def start(self) -> None:
        """Answer the requests of the connection, one after the other.

        aiohttp's own makes a task of each, so that they do not share context variables, which nothing here has: 6 µs.
        It takes over with the first request that is not plain.
        """
        while not self._force_close:
            if not self._messages:
                self._waiter = self._loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            if not self._next_is_plain():
                await super().start()
                return
            message, payload = self._messages.popleft()
            assert self._parser is not None
            self._parser.message_consumed()
            try:
                lives_on = await self._answer(message, payload)
                if not payload.is_eof() and not self._is_gone():
                    lives_on = await self._rest_came(payload) and lives_on
            except ConnectionError:  # the client has hung up, or the answer had begun when something went wrong
                break
            except Exception:
                self.log_exception("an answer could not be written")
                self.force_close()
                break
            if not lives_on:
                break
            self._wait_for_another()
        if not self._force_close and self.transport is not None:
            self._task_handler = None
            self.transport.close()

    def _next_is_plain(self) -> bool:
        """Whether nothing waits behind the next request, which is one for HTTP."""
        upgrade = getattr(self._messages[0][0], "upgrade", True)  # which what no request could be made of does not have
        return not upgrade and len(self._messages) == 1 and not self._upgraded

    async def _answer(self, message: Any, payload: Any) -> bool:
        """Answer a request; whether the connection lives on."""
        manager, task = self._manager, self._task_handler
        assert manager is not None
        assert task is not None
        manager.requests_count += 1
        request = web.BaseRequest(message, payload, self, StreamWriter(self, self._loop), task, self._loop)
        self._request_in_progress, self._current_request = True, request
        try:
            try:
                response = await manager.request_handler(request)
            except Exception as error:
                response = self.handle_error(request, 500, error)
            self._current_request = None
            self._remember_head(message, response.status)
            if type(response) is WholeAnswer and not self._upgraded:
                gone = not self._write_whole(request, response) or (self.writing_paused and await self._stalled())
            else:
                response, gone = await super().finish_response(request, response, None)
        except asyncio.CancelledError:
            self.force_close()
            raise
        finally:
            request._task = None  # type: ignore[assignment]  # a request in a traceback would keep the task, and it that
            self._request_in_progress, self._current_request = False, None
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        return bool(response.keep_alive) and not gone and not self._close and not self._force_close

    async def _rest_came(self, payload: Any) -> bool:
        """Whether the client sends the rest of a body that its handler did not want, before it reads the answer.

        Also where the connection ends with the answer: to close it on what still comes would reset it, and take the
        answer from a client that has not read it yet.
        """
        with contextlib.suppress(TimeoutError, web.RequestPayloadError):
            async with asyncio.timeout(self._lingering_time):
                while not payload.is_eof():
                    await payload.readany()
        return bool(payload.is_eof())

    def _is_gone(self) -> bool:
        """Whether nobody is there any more to read an answer."""
        return self._force_close or self.transport is None or self.transport.is_closing()

    def _remember_head(self, message: Any, status: int) -> None:
        parsed = self._parsed_head
        if parsed is not None and parsed[1] is message:  # not that of a request that has come meanwhile
            self._parsed_head = None  # nothing of a refused one is kept while the connection is idle
            if status == HTTPStatus.OK:
                self._head = Head.of(*parsed) or self._head

    def _wait_for_another(self) -> None:
        self._keepalive = True
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write an answer that is all there in one piece; True besides where the client has hung up."""
        if type(resp) is not WholeAnswer or self._upgraded:
            return await super().finish_response(request, resp, start_time)
        return resp, not self._write_whole(request, resp) or (self.writing_paused and await self._stalled())

    def _write_whole(self, request: web.BaseRequest, answer: WholeAnswer) -> bool:
        """Write an answer; False where the client has hung up."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        transport.write(answer.written(request))
        return True

    async def _stalled(self) -> bool:
        """Wait for a client that is slow to take its answer; True where it has hung up."""
        try:
            await self._drain_helper()
        except ConnectionError:
            return True
        return False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What no request could be made of is answered in the form of all other errors."""
        super().handle_error(request, status, exc, message)  # logs it; raises where an answer has begun
        failure = errors.broken_request(message or "") if status < 500 else errors.internal_error()
        response = failure.response(f"req_{secrets.token_hex(12)}")
        response.force_close()
        return response
