"""What every arrangement of store nodes has in common: one server, a primary that sentinels watch, a cluster."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from gateway.credits.addresses import Endpoint
from gateway.credits.connection import Connection, Reply, connect_to
from gateway.credits.errors import StoreRefused, StoreUnavailable, StoreUnsuitable

T = TypeVar("T")
#: Called after calls go to another primary than before, which may not know the last writes of the one before.
Changed = Callable[[], None]

#: Refusals of a node that is not the primary (any more), or has not loaded its data yet.
DEMOTED = frozenset({"READONLY", "MASTERDOWN", "LOADING"})
RECONNECT_FIRST_S, RECONNECT_MOST_S = 0.02, 0.5

_MOST_REDIRECTIONS = 16
_AT_ONCE = 2  # redirections without a pause; more mean that the nodes do not agree yet
_PAUSE_FIRST_S, _PAUSE_MOST_S = 0.01, 0.2
_WRONG_MODE = {
    "standalone": "is no node of a cluster: use a redis:// URL",
    "cluster": "is a node of a cluster: use a redis+cluster:// URL",
    "sentinel": "is a sentinel: use a redis+sentinel:// URL",
}


class Topology(Protocol):
    """The way to the primaries. ``connected`` is set while each has a connection.

    Nothing that may have run is ever sent twice from here: only the caller knows what may be repeated. The refusals
    in this package's topologies prove that a command did not run; it is then sent again, within limits.
    """

    connected: asyncio.Event

    async def start(self) -> None:
        """Connect to every primary. Raises StoreError."""

    async def close(self) -> None:
        """Give up all connections."""

    def primary_of(self, key: str | None) -> Connection:
        """The connection to the primary of the key's slot as far as is known, or to any without a key. Raises
        StoreUnavailable if it is missing."""

    def primaries(self) -> list[Connection]:
        """A connection to every primary. Raises StoreUnavailable if one is missing."""

    async def mend(self, way: Connection, refusal: StoreRefused, key: str | None, command: bytes) -> Reply:
        """Send a command again that was refused on its way, where the refusal proves that it did not run. Raises
        StoreUnavailable, at once where there is no connection and after about the timeout at the latest, or any other
        refusal."""


@dataclass(frozen=True, slots=True)
class Node:
    """A server as it describes itself. run_id: another one after every start of it. role: ``master`` or ``slave``.
    All empty where the server does not tell."""

    run_id: str = ""
    mode: str = ""
    role: str = ""


class Opener:
    """Opens connections that are ready for scripts. mode: the kind of server that is wanted."""

    def __init__(self, timeout_ms: int, mode: Literal["standalone", "cluster"], script_texts: Sequence[str]) -> None:
        self._timeout_ms = timeout_ms
        self._mode = mode
        self._script_texts = script_texts

    async def open(self, endpoint: Endpoint) -> tuple[Connection, Node]:
        """Connect, log in, load the scripts. Raises StoreUnavailable, StoreRefused, and StoreUnsuitable for a server
        of another kind."""
        connection = await connect_to(endpoint, self._timeout_ms)
        try:
            node = await _describe(connection)
            if node.mode in _WRONG_MODE and node.mode != self._mode:
                raise StoreUnsuitable(f"the store at {endpoint} {_WRONG_MODE[node.mode]}")
            await asyncio.gather(*(connection.send("SCRIPT", "LOAD", text) for text in self._script_texts))
        except BaseException:
            connection.close()
            raise
        return connection, node


async def _describe(connection: Connection) -> Node:
    try:
        text: bytes = await connection.send("INFO")
    except StoreRefused as refusal:
        if code_of(refusal) != "NOPERM":
            raise
        return Node()
    facts = dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)
    mode = facts.get("redis_mode") or facts.get("server_mode", "")
    return Node(facts.get("run_id", ""), mode, facts.get("role", ""))


def code_of(refusal: StoreRefused) -> str:
    """The first word of an error reply."""
    return str(refusal).partition(" ")[0]


class Retries:
    """How often and how long one call may be sent again after refusals that prove that it did not run."""

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._pause_s = _PAUSE_FIRST_S
        self._redirections = 0

    async def pause(self, refusal: StoreRefused) -> None:
        """Wait a little. Raises StoreUnavailable when the time for this call is over."""
        if self._loop.time() + self._pause_s > self._deadline:
            raise _given_up(refusal) from refusal
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, _PAUSE_MOST_S)

    async def redirected(self, refusal: StoreRefused) -> None:
        """Count a redirection. Raises StoreUnavailable when there were too many."""
        self._redirections += 1
        if self._redirections > _MOST_REDIRECTIONS:
            raise _given_up(refusal) from refusal
        if self._redirections > _AT_ONCE:
            await self.pause(refusal)

    async def within(self, step: Awaitable[T], refusal: StoreRefused) -> T:
        """Wait for what the next attempt needs. Raises StoreUnavailable when the time for this call is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                return await step
        raise _given_up(refusal) from refusal


def _given_up(refusal: StoreRefused) -> StoreUnavailable:
    return StoreUnavailable(f"the store could not run it in time: {refusal}")
