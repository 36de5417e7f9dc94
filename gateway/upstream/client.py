"""Requests to upstreams, with the gateway's own key in place of the customer's."""

import asyncio
import ssl
from collections.abc import Mapping
from typing import NamedTuple

from gateway.config.model import Upstream
from gateway.upstream.answer import UpstreamAnswer
from gateway.upstream.connection import Connection, Pieces
from gateway.upstream.errors import (
    DeadlinePassed,
    HungUp,
    NoConnection,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.upstream.headers import Head
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.upload import Upload, write_upload

__all__ = [
    "DeadlinePassed",
    "Pieces",
    "Upload",
    "UpstreamAnswer",
    "UpstreamClient",
    "UpstreamError",
    "UpstreamTimeout",
    "UpstreamUnavailable",
]

# A server that is being replaced is back soon.
_RECONNECT_PAUSE_S = 0.2
# What may be asked twice: it changes nothing, and has no body that would have to be sent again.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Peer(NamedTuple):
    """An upstream's heads and connections. Upstreams at the same place share their connections."""

    head: Head
    pool: Pool


class UpstreamClient:
    """The connections to all upstreams."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._peers: dict[str, Peer] = {}
        self._pools: dict[Origin, Pool] = {}
        self._tls: ssl.SSLContext | None = None

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.close()

    def send(
        self,
        upstream: Upstream,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Pieces | Upload | None = None,
    ) -> "Sending":
        """Send a request (path: below the base URL; body: JSON, or an upload); the answer, until the block is left.

        Leaving it before the body's end closes the connection, which tells the upstream to stop. Where no connection is
        to be had it is tried once more, because nothing was sent then; whatever came of a request that was sent stands,
        but for one that changes nothing and met a connection that was closing.
        Raises UpstreamUnavailable and UpstreamTimeout.
        """
        return Sending(self, upstream, method, path, headers, body)

    def begin(
        self, upstream: Upstream, path: str, headers: Mapping[str, str], body: bytes | Pieces
    ) -> UpstreamAnswer | None:
        """The same of a POST, sent at once over a connection that is idle; None where there is none.

        The answer's head is to be waited for, and it must be abandoned in the end. Without the layers of a block the
        usual request is 10 k instructions cheaper.
        """
        peer, head = self.written(upstream, "POST", path, headers, body)
        connection = peer.pool.idle()
        if connection is None:
            return None
        deadline = self._loop.time() + upstream.total_timeout_ms / 1000
        return connection.ask(head, body, idle_s=upstream.idle_timeout_ms / 1000, deadline=deadline)

    def written(
        self,
        upstream: Upstream,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Pieces | Upload | None,
    ) -> tuple["Peer", bytes]:
        """Who is to be sent a request, and its head. Raises UpstreamUnavailable where it would be none."""
        try:
            peer = self.peer_of(upstream)
            return peer, peer.head.written(method, path, headers, body)
        except ValueError as error:
            raise UpstreamUnavailable(f"the request cannot be sent: {error}") from error

    def now(self) -> float:
        """The time by the loop's clock, in seconds."""
        return self._loop.time()

    def peer_of(self, upstream: Upstream) -> "Peer":
        """What is kept for an upstream."""
        peer = self._peers.get(upstream.name)
        if peer is None or peer.head.upstream is not upstream:  # its configuration was read again
            head = Head(upstream)
            peer = self._peers[upstream.name] = Peer(head, self._pool_of(head.origin))
        return peer

    def _pool_of(self, origin: Origin) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            if origin.tls and self._tls is None:
                self._tls = ssl.create_default_context()
                self._tls.set_alpn_protocols(["http/1.1"])
            pool = self._pools[origin] = Pool(origin, self._tls if origin.tls else None)
        return pool


class Sending:
    """A request on its way, and its answer until the block is left."""

    __slots__ = ("_answer", "_body", "_client", "_deadline", "_headers", "_method", "_path", "_upload", "_upstream")

    def __init__(
        self,
        client: UpstreamClient,
        upstream: Upstream,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Pieces | Upload | None,
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._method = method
        self._path = path
        self._headers = headers
        self._body = body
        self._answer: UpstreamAnswer | None = None
        self._upload: asyncio.Task[None] | None = None

    async def __aenter__(self) -> UpstreamAnswer:
        self._deadline = self._client.now() + self._upstream.total_timeout_ms / 1000
        peer, head = self._client.written(self._upstream, self._method, self._path, self._headers, self._body)
        connection = peer.pool.idle()
        if connection is not None:
            try:
                return await self._ask(connection, head)
            except HungUp:
                if self._method not in _SAFE or self._body is not None:
                    raise
        return await self._ask(await self._connect(peer.pool), head)

    async def __aexit__(self, *_: object) -> None:
        if self._upload is not None:
            await self._leave()
        elif self._answer is not None:
            self._answer.abandon()  # nothing, if it is whole

    async def _connect(self, pool: Pool) -> Connection:
        timeout_s = self._upstream.connect_timeout_ms / 1000
        try:
            return await pool.connect(min(timeout_s, self._deadline - self._client.now()))
        except NoConnection:
            await asyncio.sleep(_RECONNECT_PAUSE_S)
            return await pool.connect(min(timeout_s, self._deadline - self._client.now()))

    async def _ask(self, connection: Connection, head: bytes) -> UpstreamAnswer:
        upload = self._body if isinstance(self._body, Upload) else None
        self._answer = answer = connection.ask(
            head,
            None if isinstance(self._body, Upload) else self._body,
            head_only=self._method == "HEAD",
            uploading=upload is not None,
            idle_s=self._upstream.idle_timeout_ms / 1000,
            deadline=self._deadline,
        )
        if upload is not None:
            # The only task there is: an answer may come, and end, before the client has sent all of the body.
            self._upload = asyncio.create_task(write_upload(connection, upload))
        try:
            await answer.head()
        except BaseException:
            await self._leave()
            raise
        return answer

    async def _leave(self) -> None:
        if self._answer is not None:
            self._answer.abandon()  # nothing, if it is whole
        if self._upload is not None:
            self._upload.cancel()
            await asyncio.wait((self._upload,))
