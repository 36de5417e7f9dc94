"""One connection to a store node: commands of the same moment are written together, replies come in order.

A command per round trip through a general client costs about 110 µs of Python; written together it is a tenth
of that, and the server's syscalls are shared as well. The event loop's transports write at once, a system call for each
command (20 µs on a loopback): so what is written in one turn of the loop is gathered here.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from gateway.credits.addresses import Endpoint, read_url
from gateway.credits.errors import ReplyLost, StoreRefused, StoreUnavailable

#: A reply: bytes, int, None, or a list of replies.
Reply = Any
Command = tuple[str | bytes | int, ...]

#: Commands that may wait for a reply on one connection; beyond it the store is as good as down.
MAX_PENDING = 20_000

#: How much longer than its time a late reply is waited for, as a part of that. A process that stood still, alone or
#: with its machine, finds the timer due before it has read what came long ago.
_LAST_LOOK = 0.1

_NO_ANSWER = "the store does not answer"
_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_pack: Callable[[Command], bytes] = cast(Any, hiredis.pack_command)  # its stub names 1-tuples


class Connection(asyncio.Protocol):
    """A pipelined connection. Made by ``connect``; of no use once ``lost`` is set.

    on_lost: called once, when ``lost`` is set.
    """

    def __init__(self, timeout_ms: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_ms / 1000
        self._reader = hiredis.Reader(replyError=StoreRefused)
        self._outbox: list[bytes] = []
        self._pending: deque[tuple[asyncio.Future[Reply], float]] = deque()
        self._transport: asyncio.Transport  # there is one before anybody has the connection
        self._watchdog: asyncio.TimerHandle | None = None
        self._looks_again = False
        self._lost = False
        self.lost = asyncio.Event()
        self.on_lost: Callable[[], None] | None = None

    @property
    def idle(self) -> bool:
        """Whether no command waits for its reply."""
        return not self._pending

    def send(self, *command: str | bytes | int) -> "asyncio.Future[Reply]":
        """Like ``write``, of a command in its words."""
        return self.write(_pack(command))

    def write(self, command: bytes) -> "asyncio.Future[Reply]":
        """Write a packed command; its reply is the future's result.

        Raises StoreUnavailable at once if nothing was written. The future raises ReplyLost if the connection
        ends first and StoreRefused for an error reply. Cancelling the future does not recall the command.
        """
        pending = self._pending
        if self._lost or len(pending) >= MAX_PENDING:
            raise StoreUnavailable(_NO_ANSWER)
        loop = self._loop
        future: asyncio.Future[Reply] = asyncio.Future()  # a third of the work of uvloop's own create_future
        pending.append((future, loop.time() + self._timeout_s))
        if not self._outbox:
            loop.call_soon(self._flush)
        self._outbox.append(command)
        if self._watchdog is None:
            self._watchdog = loop.call_later(self._timeout_s, self._check_oldest)
        return future

    def _flush(self) -> None:
        if not self._lost:
            self._transport.write(b"".join(self._outbox))
        self._outbox.clear()

    def write_asking(self, command: bytes) -> "asyncio.Future[Reply]":
        """Like ``write``, for a slot that the node does not own yet but takes in. ASKING holds for the next command
        only, so nothing may come between the two."""
        if len(self._pending) + 1 >= MAX_PENDING:
            raise StoreUnavailable(_NO_ANSWER)
        self.write(_ASKING).add_done_callback(_ignore)  # if it fails, so does the command
        return self.write(command)

    def close(self) -> None:
        """End the connection; commands without a reply fail with ReplyLost."""
        self._transport.abort()
        self._fail_pending("the connection to the store was closed")

    def _check_oldest(self) -> None:
        # One timer for the whole connection: replies come in order, so only the oldest command can be late.
        self._watchdog = None
        looked_again, self._looks_again = self._looks_again, False
        if not self._pending:
            return
        wait_s = self._pending[0][1] - self._loop.time()
        if wait_s <= 0 and looked_again:
            self.close()
            return
        if wait_s <= 0:
            # Once, whoever is the oldest by then: a store that is ever later than its time is as good as down.
            self._looks_again, wait_s = True, self._timeout_s * _LAST_LOOK
        self._watchdog = self._loop.call_later(wait_s, self._check_oldest)

    def _fail_pending(self, reason: str) -> None:
        first, self._lost = not self._lost, True
        self.lost.set()
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        while self._pending:
            future, _ = self._pending.popleft()
            if not future.done():
                future.set_exception(ReplyLost(reason))
        if first and self.on_lost is not None:
            self.on_lost()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop: hand each complete reply to the command that waits for it."""
        reader, pending = self._reader, self._pending
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                future, _ = pending.popleft()
                if future.done():
                    continue
                if isinstance(reply, StoreRefused):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except (hiredis.ProtocolError, IndexError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._fail_pending(f"the connection to the store ended: {exc or 'closed by the store'}")


def pack(*command: str | bytes | int) -> bytes:
    """A command as ``write`` takes it."""
    return _pack(command)


def _ignore(future: "asyncio.Future[Reply]") -> None:
    if not future.cancelled():
        future.exception()


async def connect(url: str, timeout_ms: int) -> Connection:
    """Connect to the one server that a redis://, rediss:// or unix:// URL names; see ``connect_to``.

    ``?ssl_ca_certs=FILE`` names the authority of a rediss:// server's certificate, if the system does not know it.
    Raises StoreUnsuitable for an option in the URL that has no effect here.
    """
    return await connect_to(read_url(url).endpoint, timeout_ms)


async def connect_to(endpoint: Endpoint, timeout_ms: int) -> Connection:
    """Connect and log in.

    Raises StoreUnavailable when nobody answers in time, and StoreRefused for a wrong password or database.
    """
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            connection = await _open(endpoint, timeout_ms)
            await _log_in(connection, endpoint)
    except (OSError, TimeoutError) as error:
        if connection is not None:
            connection.close()
        raise StoreUnavailable(f"cannot reach the store: {error or 'timed out'}") from error
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


async def _open(endpoint: Endpoint, timeout_ms: int) -> Connection:
    loop = asyncio.get_running_loop()
    if endpoint.path:
        _, connection = await loop.create_unix_connection(lambda: Connection(timeout_ms), endpoint.path)
        return connection
    context = ssl.create_default_context(cafile=endpoint.ca_file) if endpoint.tls else None
    _, connection = await loop.create_connection(
        lambda: Connection(timeout_ms), endpoint.host, endpoint.port, ssl=context
    )
    return connection


async def _log_in(connection: Connection, endpoint: Endpoint) -> None:
    if endpoint.password:
        await connection.send("AUTH", *([endpoint.username] if endpoint.username else []), endpoint.password)
    if endpoint.database:
        await connection.send("SELECT", endpoint.database)
