"""Finds the primary that sentinels watch."""

import asyncio
import time
from typing import NamedTuple

from gateway.credits.addresses import Address, StoreUrl
from gateway.credits.connection import Connection, Reply, connect_to
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.single import refuse_replica
from gateway.credits.topology import Node, Opener, code_of

#: How long most sentinels are thought not to have heard of a failover: they tell each other every two seconds.
_UNHEARD_S = 60.0


class _Answer(NamedTuple):
    """Which node is the primary, since which failover: the answer of the highest epoch is the newest."""

    epoch: int
    address: Address


class SentinelLocator:
    """The primary is the node that the sentinels call url.primary_name."""

    def __init__(self, url: StoreUrl, timeout_ms: int, opener: Opener) -> None:
        self._url = url
        self._timeout_ms = timeout_ms
        self._opener = opener
        self._newest: _Answer | None = None  # while its node is the primary
        self._confirmed_at = 0.0

    async def open(self) -> tuple[Connection, Node]:
        """Ask, and connect to the node that they name. Raises StoreError."""
        newest = self._newest = await self._ask()
        try:
            connection, node = await self._opener.open(self._url.endpoint.at(newest.address))
            # A sentinel may not have heard of a failover yet; the node itself knows.
            return refuse_replica(connection, node, str(newest.address))
        except StoreError:
            self._newest = None  # a failover may have been taken back, or the sentinels set up anew
            raise

    async def replaced(self) -> bool:
        """Whether they name another node now. Raises StoreError."""
        before = self._newest
        if before is None:
            return True
        newest = self._newest = await self._ask()  # kept: those that are asked next may not have heard of it
        return newest.address != before.address

    async def _ask(self) -> _Answer:
        # For a second or so after a failover most sentinels may not have heard of it, and the old primary still takes
        # writes, all of them to be thrown away: who has heard does not go back.
        answer = await _ask_most(self._url, self._timeout_ms)
        newest, now = self._newest, time.monotonic()
        # Sentinels that were set up anew count failovers from the beginning.
        if newest is None or answer.epoch >= newest.epoch or now - self._confirmed_at > _UNHEARD_S:
            self._confirmed_at = now
            return answer
        return newest


async def _ask_most(url: StoreUrl, timeout_ms: int) -> _Answer:
    """Ask all at once and take the newest of what most of them answer, so that neither one that is cut off nor one
    that hangs decides."""
    asks = [asyncio.create_task(_ask(url, sentinel, timeout_ms)) for sentinel in url.addresses]
    answers: list[_Answer] = []
    failure: StoreError = StoreUnavailable("no sentinel answers")
    try:
        for next_answer in asyncio.as_completed(asks):
            try:
                answers.append(await next_answer)
            except StoreError as error:
                failure = error
            if len(answers) > len(asks) // 2:
                break
    finally:
        for ask in asks:
            ask.cancel()
        await asyncio.gather(*asks, return_exceptions=True)
    if not answers:
        raise failure
    return max(answers)


async def _ask(url: StoreUrl, sentinel: Address, timeout_ms: int) -> _Answer:
    try:
        connection = await connect_to(url.endpoint.at(sentinel).without_login(), timeout_ms)
    except StoreUnavailable as error:
        raise StoreUnavailable(f"sentinel {sentinel}: {error}") from error
    try:
        address, state = await _primary_of(connection, url)
    finally:
        connection.close()
    if address is None:
        raise StoreUnsuitable(f"sentinel {sentinel} knows no primary called {url.primary_name!r}")
    facts = dict(zip(state[::2], state[1::2], strict=False))
    return _Answer(int(facts.get(b"config-epoch", 0)), Address(address[0].decode(), int(address[1])))


async def _primary_of(connection: Connection, url: StoreUrl) -> tuple[Reply, list[bytes]]:
    address, state = await _both(connection, url.primary_name)
    if isinstance(address, StoreRefused) and code_of(address) == "NOAUTH" and url.endpoint.password:
        # Sentinels mostly need no login of their own; where they do, it is the same one.
        login = [url.endpoint.username] if url.endpoint.username else []
        await connection.send("AUTH", *login, url.endpoint.password)
        address, state = await _both(connection, url.primary_name)
    if isinstance(address, StoreRefused) and code_of(address) == "ERR":
        raise StoreUnsuitable("store.url lists a server that is no sentinel") from address
    for reply in (address, state):
        if isinstance(reply, BaseException) and address is not None:  # of a name that it does not know, only that
            raise reply
    return address, state


async def _both(connection: Connection, name: str) -> tuple[Reply, Reply]:
    """Where the primary is, and since when; written together, so that no failover comes between the two."""
    questions = ("GET-MASTER-ADDR-BY-NAME", "MASTER")
    address, state = await asyncio.gather(
        *(connection.send("SENTINEL", question, name) for question in questions), return_exceptions=True
    )
    return address, state
