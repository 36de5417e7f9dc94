"""Connections to upstreams: opened where none is idle, kept for the next request, closed when they have been idle."""

import asyncio
import socket
import ssl
from dataclasses import dataclass

import aiohappyeyeballs

from gateway.upstream.connection import Connection
from gateway.upstream.errors import NoConnection, UpstreamUnavailable

# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet a closing one.
_KEEP_ALIVE_S = 4.0
# How long an address is good for: many connections opened at once ask for it once.
_LOOKUP_S = 10.0
# After so long the next of a host's addresses is tried beside the one that has not answered yet.
_NEXT_ADDRESS_S = 0.25
# Closing is a matter of the loop's next turn; nothing may keep a gateway from ending.
_CLOSE_S = 1.0

_Addresses = list[aiohappyeyeballs.AddrInfoType]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections lead to."""

    tls: bool
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Pool:
    """The connections to one origin. tls: how its certificate is checked; None without TLS."""

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._origin = origin
        self._tls = tls
        self._open: set[Connection] = set()
        # In the order in which they became idle: the last is taken first, so that those too many get old.
        self._idle: dict[Connection, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._lookup: asyncio.Task[_Addresses] | None = None
        self._looked_up_at = 0.0
        self._closed: asyncio.Future[None] | None = None

    def idle(self) -> Connection | None:
        """A connection that was used before; None where all are busy."""
        oldest = self._loop.time() - _KEEP_ALIVE_S
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.closed and connection.freed_at > oldest:  # its timer may be late where much is to do
                return connection
            connection.drop()
        return None

    async def connect(self, timeout_s: float) -> Connection:
        """A new connection. Raises NoConnection, and UpstreamUnavailable if it takes longer than timeout_s."""
        if self._closed is not None:
            raise UpstreamUnavailable("the gateway is closing")
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await self._connect()
        except OSError as error:  # of which TimeoutError is one, which a socket may raise as well
            if limit.expired():
                raise UpstreamUnavailable("connecting took too long") from None
            raise NoConnection(f"no connection to {self._origin}: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """Close all connections, and return when they are closed."""
        self._closed = self._closed or self._loop.create_future()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.fail(UpstreamUnavailable("the gateway is closing"))
        if self._open:
            await asyncio.wait((self._closed,), timeout=_CLOSE_S)

    async def _connect(self) -> Connection:
        addresses = await self._addresses()
        taken = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S, interleave=1)
        try:
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, connection = await self._loop.create_connection(
                lambda: Connection(self._freed, self._ended),
                sock=taken,
                ssl=self._tls,
                server_hostname=self._origin.host.rstrip(".") if self._tls is not None else None,
            )
        except BaseException:
            taken.close()
            raise
        if connection.closed:
            raise NoConnection(f"no connection to {self._origin}: it was closed at once")
        self._open.add(connection)
        if self._closed is not None:
            connection.drop()
            raise UpstreamUnavailable("the gateway is closing")
        return connection

    async def _addresses(self) -> _Addresses:
        now = self._loop.time()
        if self._lookup is None or now - self._looked_up_at > _LOOKUP_S or _failed(self._lookup):
            self._looked_up_at = now
            self._lookup = self._loop.create_task(self._look_up())
        # One lookup for all who wait: that one of them leaves must not end it.
        return list(await asyncio.shield(self._lookup))

    async def _look_up(self) -> _Addresses:
        found = await self._loop.getaddrinfo(self._origin.host, self._origin.port, type=socket.SOCK_STREAM)
        return [(family, kind, protocol, name, address) for family, kind, protocol, name, address in found]

    def _freed(self, connection: Connection) -> None:
        connection.freed_at = self._loop.time()
        self._idle[connection] = None
        # One timer for all of them, for the one that has been idle for longest.
        if self._sweep is None:
            self._sweep = self._loop.call_later(_KEEP_ALIVE_S, self._close_old)

    def _ended(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._open.discard(connection)
        if self._closed is not None and not self._open and not self._closed.done():
            self._closed.set_result(None)

    def _close_old(self) -> None:
        self._sweep = None
        oldest = self._loop.time() - _KEEP_ALIVE_S
        for connection in list(self._idle):
            if connection.freed_at > oldest:
                self._sweep = self._loop.call_at(connection.freed_at + _KEEP_ALIVE_S, self._close_old)
                return
            del self._idle[connection]
            connection.drop()


def _failed(lookup: "asyncio.Task[_Addresses]") -> bool:
    return lookup.done() and (lookup.cancelled() or lookup.exception() is not None)
