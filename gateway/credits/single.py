"""One primary, found and connected to again whenever the connection to it is lost."""

import asyncio
import contextlib
import logging
from typing import Protocol

from gateway.credits.addresses import Endpoint
from gateway.credits.connection import Connection, Reply
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.credits.topology import (
    DEMOTED,
    RECONNECT_FIRST_S,
    RECONNECT_MOST_S,
    Changed,
    Node,
    Opener,
    Retries,
    code_of,
)

log = logging.getLogger(__name__)

#: How often it is asked whether the primary is still the primary.
_LOOK_S = 1.0
_NO_CONNECTION = "there is no connection to the store"


class Locator(Protocol):
    """Knows where the primary is."""

    async def open(self) -> tuple[Connection, Node]:
        """Find the primary and connect to it. Raises StoreError."""

    async def replaced(self) -> bool:
        """Whether another node has become the primary since ``open``. Raises StoreError if nobody can tell."""


class SinglePrimary:
    """A topology of one primary."""

    def __init__(self, locator: Locator, timeout_ms: int, changed: Changed) -> None:
        self.connected = asyncio.Event()
        self._locator = locator
        self._timeout_s = timeout_ms / 1000
        self._changed = changed
        self._connection: Connection | None = None
        self._run_id = ""
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect. Raises StoreError."""
        await self._connect()
        self._keeper = asyncio.create_task(self._keep_connected(), name="store-connection")

    async def close(self) -> None:
        """Give up the connection."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.close()

    def primary_of(self, _key: str | None) -> Connection:
        """The connection. Raises StoreUnavailable without one."""
        if self._connection is None:
            raise StoreUnavailable(_NO_CONNECTION)
        return self._connection

    def primaries(self) -> list[Connection]:
        """The connection. Raises StoreUnavailable without one."""
        return [self.primary_of(None)]

    async def mend(self, way: Connection, refusal: StoreRefused, _key: str | None, command: bytes) -> Reply:
        """Send a command again that no primary has refused. Raises StoreUnavailable, StoreRefused."""
        retries = Retries(self._timeout_s)
        while True:
            if code_of(refusal) not in DEMOTED:
                raise refusal
            way.close()  # another node is the primary now
            await retries.pause(refusal)
            await retries.within(self.connected.wait(), refusal)
            way = self.primary_of(None)
            try:
                return await way.write(command)
            except StoreRefused as again:
                refusal = again

    async def _connect(self) -> None:
        connection, node = await self._locator.open()
        if connection.lost.is_set():
            raise StoreUnavailable("the connection to the store ended at once")
        connection.on_lost = self._forget
        self._connection = connection
        self._lost.clear()
        self.connected.set()
        before, self._run_id = self._run_id, node.run_id
        if before and before != node.run_id:
            self._changed()

    def _forget(self) -> None:
        self._connection = None
        self.connected.clear()
        self._lost.set()

    async def _keep_connected(self) -> None:
        while True:
            await self._until_lost()
            log.warning("lost the connection to the store")
            pause_s = RECONNECT_FIRST_S
            while self._connection is None:
                try:
                    await self._connect()
                    log.info("connected to the store again")
                except StoreError as error:
                    log.debug("store: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, RECONNECT_MOST_S)

    async def _until_lost(self) -> None:
        # A primary that was replaced while it is alive takes writes for seconds more, all of them to be thrown away.
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._lost.wait()
                    return
            with contextlib.suppress(StoreError):
                if await self._locator.replaced() and self._connection is not None:
                    self._connection.close()


class FixedLocator:
    """The primary is the server at endpoint."""

    def __init__(self, endpoint: Endpoint, opener: Opener) -> None:
        self._endpoint = endpoint
        self._opener = opener

    async def open(self) -> tuple[Connection, Node]:
        """Connect. Raises StoreError."""
        connection, node = await self._opener.open(self._endpoint)
        return refuse_replica(connection, node, str(self._endpoint))

    async def replaced(self) -> bool:
        """Nobody but the server itself could tell."""
        return False


def refuse_replica(connection: Connection, node: Node, name: str) -> tuple[Connection, Node]:
    """What was given. Raises StoreUnavailable for a replica, whose connection it closes."""
    if node.role == "slave":
        connection.close()
        raise StoreUnavailable(f"the store at {name} is a replica, which cannot be written to")
    return connection, node
