"""Requests to upstreams, with the gateway's own key in place of the customer's.

UpstreamError
├── UpstreamUnavailable   no connection, or it broke
└── UpstreamTimeout       the request was sent and no answer came, or it did not go on, in time
    └── DeadlinePassed    the answer took longer than the gateway lets any take
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict

from gateway import __version__
from gateway.config.model import Upstream

#: What a customer's client may say to an upstream. Everything else stays here, above all every form of a key.
_FORWARDED = frozenset({"accept", "user-agent", "openai-beta", "traceparent", "tracestate"})
_FORWARDED_PREFIX = "anthropic-"

# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet a closing one.
_KEEP_ALIVE_S = 4.0
# What is read ahead of a client that is slow to read, half of what may be: a stream holds several copies of it.
_READ_AHEAD_BYTES = 2**15
# A server that is being replaced is back soon.
_RECONNECT_PAUSE_S = 0.2


class UpstreamError(Exception):
    """Base of what keeps an upstream from answering."""


class UpstreamUnavailable(UpstreamError):
    """No connection, or it broke before the answer was whole."""


class UpstreamTimeout(UpstreamError):
    """The request was sent and the answer did not come, or did not go on, in time."""


class DeadlinePassed(UpstreamTimeout):
    """The answer took longer than the gateway lets any take; the upstream itself did not fail."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is not in memory. size_bytes: None where it is not known. chunks: all of it."""

    content_type: str
    size_bytes: int | None
    chunks: Callable[[], AsyncIterator[bytes]]


class UpstreamAnswer:
    """An answer whose headers have come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.content_type
        self.headers = response.headers

    @property
    def content_type_header(self) -> str:
        """Its Content-Type as it came, or that of JSON."""
        return self.headers.get("Content-Type", "application/json")

    def abandon(self) -> None:
        """Close the connection, which tells the upstream to stop; nothing more can be read."""
        self._response.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises UpstreamError."""
        content = self._response.content
        while True:
            with mapped_errors():
                chunk = await content.readany()
            if not chunk:
                return
            yield chunk

    async def body(self, most_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError, also for one that is larger than most_bytes."""
        parts, size = [], 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > most_bytes:
                raise UpstreamUnavailable(f"the answer has more than {most_bytes} bytes")
            parts.append(chunk)
        return b"".join(parts)


class UpstreamClient:
    """One connection pool for all upstreams."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            skip_auto_headers=("User-Agent",),
            read_bufsize=_READ_AHEAD_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def send(
        self, upstream: Upstream, method: str, path: str, headers: Mapping[str, str], body: bytes | Upload | None = None
    ) -> AsyncIterator[UpstreamAnswer]:
        """Send a request (path: below the base URL; body: JSON, or an upload); the answer, until the block is left.

        Leaving it before the body's end closes the connection, which tells the upstream to stop. Where no connection is
        to be had it is tried once more, because nothing was sent then; whatever came of a request that was sent stands.
        Raises UpstreamUnavailable and UpstreamTimeout.
        """
        timeout = aiohttp.ClientTimeout(
            total=upstream.total_timeout_ms / 1000,
            sock_connect=upstream.connect_timeout_ms / 1000,
            sock_read=upstream.idle_timeout_ms / 1000,
        )

        async def request() -> aiohttp.ClientResponse:
            return await self._session.request(
                method,
                upstream.base_url + path,
                data=body.chunks() if isinstance(body, Upload) else body,
                headers=headers_for(upstream, headers, body),
                timeout=timeout,
                allow_redirects=False,
            )

        with mapped_errors():
            try:
                response = await request()
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(_RECONNECT_PAUSE_S)
                response = await request()
        try:
            yield UpstreamAnswer(response)
        finally:
            # Keeps the connection only if the body was read to its end.
            response.release() if response.content.is_eof() else response.close()


def headers_for(upstream: Upstream, headers: Mapping[str, str], body: bytes | Upload | None) -> CIMultiDict[str]:
    """What an upstream is told: of the customer's headers those that may pass, and the gateway's own key."""
    chosen = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() in _FORWARDED or name.lower().startswith(_FORWARDED_PREFIX)
    )
    chosen.setdefault("User-Agent", f"quota-gateway/{__version__}")
    chosen["Accept-Encoding"] = "identity"  # the usage is read from the bytes as they come
    if isinstance(body, Upload):
        chosen["Content-Type"] = body.content_type
        if body.size_bytes is not None:
            chosen["Content-Length"] = str(body.size_bytes)
    elif body is not None:
        chosen["Content-Type"] = "application/json"
    if upstream.api_key:
        key = upstream.api_key.reveal()
        if upstream.key_header == "x-api-key":
            chosen["x-api-key"] = key
        else:
            chosen["Authorization"] = f"Bearer {key}"
    return chosen


@contextmanager
def mapped_errors() -> Iterator[None]:
    """aiohttp's errors in this module's words."""
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
