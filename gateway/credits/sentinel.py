"""Finds the primary that sentinels watch."""

import asyncio
from typing import NamedTuple

from gateway.credits.addresses import Address, StoreUrl
from gateway.credits.connection import Connection, Reply, connect_to
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.single import refuse_replica
from gateway.credits.topology import Node, Opener, code_of


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
        self._address: Address | None = None

    async def open(self) -> tuple[Connection, Node]:
        """Ask, and connect to the node that they name. Raises StoreError."""
        self._address = await _ask_most(self._url, self._timeout_ms)
        connection, node = await self._opener.open(self._url.endpoint.at(self._address))
        # A sentinel may not have heard of a failover yet; the node itself knows.
        return refuse_replica(connection, node, str(self._address))

    async def replaced(self) -> bool:
        """Whether they name another node now. Raises StoreError."""
        return await _ask_most(self._url, self._timeout_ms) != self._address


async def _ask_most(url: StoreUrl, timeout_ms: int) -> Address:
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
    return max(answers).address


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
    name = url.primary_name
    try:
        address = await connection.send("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
    except StoreRefused as refusal:
        if code_of(refusal) == "ERR":
            raise StoreUnsuitable("store.url lists a server that is no sentinel") from refusal
        if code_of(refusal) != "NOAUTH" or not url.endpoint.password:
            raise
        # Sentinels mostly need no login of their own; where they do, it is the same one.
        login = [url.endpoint.username] if url.endpoint.username else []
        await connection.send("AUTH", *login, url.endpoint.password)
        address = await connection.send("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
    return address, [] if address is None else await connection.send("SENTINEL", "MASTER", name)
