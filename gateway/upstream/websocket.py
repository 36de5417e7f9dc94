"""A websocket to an upstream, with the gateway's own key in place of the customer's."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import aiohttp

from gateway.config.model import Upstream
from gateway.upstream.errors import DeadlinePassed, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from gateway.upstream.headers import headers_for

#: The largest message, either way: the API itself takes 15 MiB of audio.
MOST_MESSAGE_BYTES = 16 * 2**20
#: How often a silent connection is asked whether it lives; it must answer within half of that.
HEARTBEAT_S = 30.0
_MOST_ERROR_BYTES = 2**20
_CLOSE_S = 2.0
_RECONNECT_PAUSE_S = 0.2


class UpstreamRefused(UpstreamError):
    """The upstream answered the handshake with an HTTP answer of its own."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"the upstream refuses the websocket with status {status}")
        self.status = status
        self.headers = headers
        self.body = body


class UpstreamClosed(Exception):
    """The upstream has ended the connection. code: of its close frame; 1006 where there was none."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code} {reason}")
        self.code = code
        self.reason = reason


class UpstreamSocket:
    """An open connection. Reading and writing wait for the other side: nothing piles up here."""

    def __init__(self, socket: "aiohttp.ClientWebSocketResponse[bool]") -> None:
        self._socket = socket

    async def read(self) -> str:
        """The next message. Raises UpstreamClosed, also for one that is not text or is too large."""
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data)
        if message.type is aiohttp.WSMsgType.CLOSE:
            raise UpstreamClosed(message.data or 1005, message.extra or "")
        if message.type is aiohttp.WSMsgType.BINARY:
            raise UpstreamClosed(1006, "it sent a binary message")
        raise UpstreamClosed(1006, str(self._socket.exception() or "the connection broke"))

    async def write(self, text: str) -> None:
        """Send a message. Raises UpstreamClosed."""
        try:
            await self._socket.send_str(text)
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamClosed(1006, str(error)) from error


@asynccontextmanager
async def connect(
    upstream: Upstream, path: str, headers: Mapping[str, str], subprotocols: Sequence[str]
) -> AsyncIterator[UpstreamSocket]:
    """A connection until the block is left. path: below the base URL, with its query.

    Raises UpstreamUnavailable, UpstreamTimeout, and UpstreamRefused for any answer but an upgrade.
    """
    timeout = aiohttp.ClientTimeout(
        total=None,
        sock_connect=upstream.connect_timeout_ms / 1000,
        sock_read=upstream.idle_timeout_ms / 1000,
    )
    # The connection lives as long as the session of one client: there is nothing to share.
    async with aiohttp.ClientSession(
        timeout=timeout,
        middlewares=(_only_upgrades,),
        skip_auto_headers=("User-Agent",),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:

        async def open_socket() -> "aiohttp.ClientWebSocketResponse[bool]":
            return await session.ws_connect(
                upstream.base_url + path,
                headers=headers_for(upstream, headers),
                protocols=subprotocols,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),
                heartbeat=HEARTBEAT_S,
                max_msg_size=MOST_MESSAGE_BYTES,
                autoclose=False,
            )

        with _mapped_errors():
            try:
                socket = await open_socket()
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(_RECONNECT_PAUSE_S)
                socket = await open_socket()
        try:
            yield UpstreamSocket(socket)
        finally:
            await socket.close()


async def _only_upgrades(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Let nothing but an upgrade through: no redirect is followed, which would take the key elsewhere."""
    response = await handler(request)
    if response.status == 101:
        return response
    try:
        body = await response.content.read(_MOST_ERROR_BYTES)
    except aiohttp.ClientError as error:
        raise UpstreamUnavailable(str(error)) from error
    finally:
        response.close()
    raise UpstreamRefused(response.status, response.headers.copy(), body)


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """aiohttp's errors in the gateway's words."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise UpstreamUnavailable("connecting took too long") from error
    except aiohttp.ServerTimeoutError as error:
        raise UpstreamTimeout("nothing came in time") from error
    except TimeoutError as error:
        raise DeadlinePassed("the answer took longer than total_timeout") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise UpstreamUnavailable(str(error) or type(error).__name__) from error
