"""A cluster: which primary owns which slot, a connection to each, and the redirections between them."""

import asyncio
import contextlib
import logging
import random

from gateway.credits.addresses import Address, StoreUrl
from gateway.credits.connection import Connection, Reply
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.credits.keyspace import SLOTS, slot_of
from gateway.credits.topology import (
    DEMOTED,
    RECONNECT_FIRST_S,
    RECONNECT_MOST_S,
    Changed,
    Opener,
    Retries,
    code_of,
)

log = logging.getLogger(__name__)

#: The map is read anew this often even if nothing seems wrong.
_REFRESH_S = 60.0
_NOT_NOW = DEMOTED | {"TRYAGAIN", "CLUSTERDOWN"}


class Cluster:
    """The topology of a cluster. Refusals that prove that a command did not run (MOVED, ASK, TRYAGAIN, CLUSTERDOWN,
    LOADING, READONLY) are followed or waited out for at most timeout_ms."""

    def __init__(self, url: StoreUrl, timeout_ms: int, opener: Opener, changed: Changed) -> None:
        self.connected = asyncio.Event()
        self._seeds = url.addresses
        self._login = url.endpoint
        self._timeout_s = timeout_ms / 1000
        self._opener = opener
        self._changed = changed
        self._owners: list[Address | None] = [None] * SLOTS
        self._primaries: frozenset[Address | None] = frozenset()
        self._replicas: frozenset[Address] = frozenset()
        self._nodes: dict[Address, Connection] = {}
        self._opening: dict[Address, asyncio.Task[Connection]] = {}
        self._run_ids: dict[Address, str] = {}
        self._replaced = False  # an owner is another one than before, and nobody was told yet
        self._stale = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the map, connect to every primary. Raises StoreError."""
        await self._refresh()
        for address in self._primaries:
            if address is None:
                raise StoreUnavailable("the cluster has slots that no primary serves")
            await self._reach(address)
        self._keeper = asyncio.create_task(self._keep_fresh(), name="store-cluster")

    async def close(self) -> None:
        """Give up all connections."""
        tasks = [*self._opening.values(), *([self._keeper] if self._keeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.connected.clear()
        for connection in self._nodes.values():
            connection.on_lost = None
            connection.close()
        self._nodes.clear()

    def primary_of(self, key: str | None) -> Connection:
        """The connection to the primary of the key's slot, or to any. Raises StoreUnavailable if it is missing."""
        return self._connection_to(self._owner_of(None if key is None else slot_of(key)))

    def primaries(self) -> list[Connection]:
        """A connection to every primary. Raises StoreUnavailable if one is missing."""
        return [self._connection_to(address) for address in self._primaries]

    async def mend(self, way: Connection, refusal: StoreRefused, key: str | None, command: bytes) -> Reply:
        """Follow a redirection, or wait the refusal out. Raises StoreUnavailable, StoreRefused."""
        slot = None if key is None else slot_of(key)
        asked = next((address for address, node in self._nodes.items() if node is way), None)
        target = self._owner_of(slot) if asked is None else asked
        retries = Retries(self._timeout_s)
        while True:
            target, asking = await self._next_target(slot, target, refusal, retries)
            way = await retries.within(self._reach(target), refusal)
            try:
                return await (way.write_asking(command) if asking else way.write(command))
            except StoreRefused as again:
                refusal = again

    async def _next_target(
        self, slot: int | None, asked: Address, refusal: StoreRefused, retries: Retries
    ) -> tuple[Address, bool]:
        """Where to send a refused command again, and whether with ASKING. Raises what cannot be mended."""
        match str(refusal).split():
            case ["MOVED", moved, where]:
                target = _redirection(where, asked)
                self._learn(int(moved), target)
                await retries.redirected(refusal)
                return target, False
            case ["ASK", _, where]:
                await retries.redirected(refusal)
                return _redirection(where, asked), True
        if code_of(refusal) not in _NOT_NOW:
            raise refusal
        self._stale.set()
        await retries.pause(refusal)
        return self._owner_of(slot), False

    def _learn(self, slot: int, owner: Address) -> None:
        self._owners[slot] = owner
        self._replaced |= owner not in self._primaries
        self._primaries |= {owner}
        self._stale.set()

    def _owner_of(self, slot: int | None) -> Address:
        primaries = (address for address in self._nodes if address in self._primaries)
        owner = next(primaries, None) if slot is None else self._owners[slot]
        if owner is None:
            raise StoreUnavailable("there is no connection to the store")
        return owner

    def _connection_to(self, address: Address | None) -> Connection:
        connection = self._nodes.get(address) if address is not None else None
        if connection is None:
            raise StoreUnavailable(f"there is no connection to the store's node {address}")
        return connection

    async def _reach(self, address: Address) -> Connection:
        """The connection to a node, opened if there is none; who wants it at the same moment shares the attempt."""
        if (connection := self._nodes.get(address)) is not None:
            return connection
        return await asyncio.shield(self._start_opening(address))

    def _start_opening(self, address: Address) -> asyncio.Task[Connection]:
        def done(task: asyncio.Task[Connection]) -> None:
            del self._opening[address]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.debug("store node %s: %s", address, error)

        if address not in self._opening:
            self._opening[address] = asyncio.create_task(self._open(address), name=f"store-node-{address}")
            self._opening[address].add_done_callback(done)
        return self._opening[address]

    async def _open(self, address: Address) -> Connection:
        connection, node = await self._opener.open(self._login.at(address))
        if connection.lost.is_set():
            raise StoreUnavailable("the connection to the store ended at once")
        connection.on_lost = lambda: self._forget(address)
        self._nodes[address] = connection
        self._replaced |= self._run_ids.get(address, node.run_id) != node.run_id
        self._run_ids[address] = node.run_id
        self._review()
        return connection

    def _forget(self, address: Address) -> None:
        del self._nodes[address]
        if address in self._primaries:
            log.warning("lost the connection to the store's node %s", address)
            self._review()

    def _review(self) -> None:
        """Say whether every primary has a connection, and once it has, whether there is a new one among them."""
        if not self._primaries <= self._nodes.keys():
            self.connected.clear()
            self._stale.set()
            return
        self.connected.set()
        if self._replaced:
            self._replaced = False
            self._changed()

    async def _keep_fresh(self) -> None:
        pause_s = RECONNECT_FIRST_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await self._stale.wait()
            self._stale.clear()
            try:
                await self._refresh()
            except StoreError as error:
                log.debug("store: %s", error)
                self._stale.set()
            await asyncio.sleep(pause_s)  # in any case: one look answers all the redirections of a moment
            pause_s = min(pause_s * 2, RECONNECT_MOST_S) if self._stale.is_set() else RECONNECT_FIRST_S

    async def _refresh(self) -> None:
        """Read the map, begin to connect to new primaries, let go of nodes that are none."""
        ranges = await self._read_map()
        owners: list[Address | None] = [None] * SLOTS
        for first, last, nodes in ranges:
            owners[first : last + 1] = [nodes[0]] * (last + 1 - first)
        before, self._primaries = self._primaries, frozenset(owners)
        self._owners = owners
        self._replicas = frozenset(replica for _, _, nodes in ranges for replica in nodes[1:])
        self._replaced |= bool(before and self._primaries - before)
        self._run_ids = {address: run_id for address, run_id in self._run_ids.items() if address in self._primaries}
        for address in self._primaries:
            if address is not None and address not in self._nodes:
                self._start_opening(address)
        for address, connection in list(self._nodes.items()):
            if address not in self._primaries and connection.idle:
                connection.close()
        self._review()

    async def _read_map(self) -> list[tuple[int, int, list[Address]]]:
        """The slots' ranges and their nodes, primary first, as one node sees them: any, because the one that was
        asked last time may be cut off from the others."""
        failure: StoreError = StoreUnavailable("no node of the cluster serves any slot")
        known = {*self._seeds, *self._replicas, *(address for address in self._primaries if address)}
        connected = list(self._nodes)
        others = list(known.difference(connected))
        random.shuffle(connected)
        random.shuffle(others)
        for address in connected + others:
            try:
                connection = await self._reach(address)
                if ranges := _read_ranges(await connection.send("CLUSTER", "SLOTS"), address):
                    return ranges
            except StoreError as error:
                failure = error
        raise failure


def _read_ranges(reply: Reply, asked: Address) -> list[tuple[int, int, list[Address]]]:
    return [
        (first, last, [Address(_host(host or b"", asked), port) for host, port, *_ in nodes])
        for first, last, *nodes in reply
    ]


def _redirection(where: str, asked: Address) -> Address:
    host, _, port = where.rpartition(":")
    return Address(_host(host.encode(), asked), int(port))


def _host(told: bytes, asked: Address) -> str:
    # A node that does not know its own name tells none, or a question mark: it is the one that was asked.
    return asked.host if told in (b"", b"?") else told.decode()
