"""The data listener's side of connections, as far as it is not aiohttp's own."""

import asyncio
import logging
import secrets
import socket

from aiohttp import web

from gateway.http import errors
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
        return _Connection(self, loop=asyncio.get_running_loop(), access_log=_SILENT)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel end the connection of a client that takes nothing: no await may be waiting for it any more."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # only Linux has it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CLIENT_STALL_MS)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write an answer that is all there in one piece; True besides where the client has hung up."""
        if type(resp) is not WholeAnswer or self._upgraded:
            return await super().finish_response(request, resp, start_time)
        if self.transport is None or self.transport.is_closing():
            return resp, True
        self.transport.write(resp.written(request))
        try:
            if self.writing_paused:
                await self._drain_helper()
        except ConnectionError:
            return resp, True
        return resp, False

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
