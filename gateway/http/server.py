"""The data listener's side of connections, as far as it is not aiohttp's own."""

import asyncio
import logging
import secrets
import socket

from aiohttp import web

from gateway.http import errors
from gateway.http.proxy import Proxy

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
