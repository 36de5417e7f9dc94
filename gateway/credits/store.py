"""The store: one node, reached over one connection that is made again whenever it is lost."""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from dataclasses import dataclass
from importlib.resources import files

from gateway.credits.connection import Connection, Reply, connect
from gateway.credits.errors import StoreError, StoreRefused, StoreUnavailable, StoreUnsuitable
from gateway.credits.keyspace import META, PREFIX, SHARDS, shard_keys
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

SCRIPTS = ("reserve", "settle", "release", "due", "create", "set_plan", "credit", "show")
_INCLUDE = re.compile(r"^--#include (.+)$", re.MULTILINE)
_RECONNECT_FIRST_S, _RECONNECT_MOST_S = 0.02, 0.5


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its whole text, libraries included, and the SHA-1 that EVALSHA wants."""

    name: str
    text: str
    sha: str


def load_script(name: str) -> Script:
    """Read lua/NAME.lua and put the libraries named by its ``--#include`` line in their place."""
    folder = files("gateway.credits") / "lua"

    def libraries(match: re.Match[str]) -> str:
        return "\n".join((folder / "lib" / f"{library}.lua").read_text() for library in match[1].split())

    text = _INCLUDE.sub(libraries, (folder / f"{name}.lua").read_text())
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class Store:
    """Runs the scripts on one store node.

    Calls fail at once with StoreUnavailable while there is no connection; nothing is ever sent twice from here,
    because only the caller knows what may be repeated.
    """

    def __init__(self, url: str, timeout_ms: int, metrics: Metrics, *, allow_unsafe: bool = False) -> None:
        self._allow_unsafe = allow_unsafe
        self._url = url
        self._timeout_ms = timeout_ms
        self._metrics = metrics
        self._scripts = {name: load_script(name) for name in SCRIPTS}
        self._connection: Connection | None = None
        self._connected = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, check the store's settings, lay out the shards. Raises StoreError where that fails."""
        await self._connect()
        if not self._allow_unsafe:
            await self._check_settings()
        if not await self.call("EXISTS", META):
            await self._install()
        self._keeper = asyncio.create_task(self._keep_connected(), name="store-connection")

    async def close(self) -> None:
        """Give up the connection."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.close()

    async def call(self, *command: str | bytes | int) -> Reply:
        """One plain command. Raises StoreUnavailable or StoreRefused."""
        if self._connection is None:
            raise StoreUnavailable("there is no connection to the store")
        return await self._connection.send(*command)

    async def run(self, name: str, keys: tuple[str, ...], args: tuple[str | int, ...]) -> list[bytes]:
        """One script. Raises StoreUnavailable or StoreRefused."""
        script = self._scripts[name]
        started = time.perf_counter()
        try:
            reply = await self.call("EVALSHA", script.sha, len(keys), *keys, *args)
        except StoreRefused as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
            # Flushed, or another node since a failover: the script did not run, so it may be sent again.
            reply = await self.call("EVAL", script.text, len(keys), *keys, *args)
        self._metrics.store_call(name, time.perf_counter() - started)
        return reply  # type: ignore[no-any-return]

    async def wait_connected(self, timeout_s: float) -> bool:
        """Whether there is a connection within timeout_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        return self._connected.is_set()

    async def _connect(self) -> None:
        connection = await connect(self._url, self._timeout_ms)
        try:
            await asyncio.gather(*(connection.send("SCRIPT", "LOAD", script.text) for script in self._scripts.values()))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._connected.set()

    async def _keep_connected(self) -> None:
        pause_s = _RECONNECT_FIRST_S
        while True:
            if self._connection is not None:
                await self._connection.lost.wait()
                self._connection = None
                self._connected.clear()
                log.warning("lost the connection to the store")
                pause_s = _RECONNECT_FIRST_S
            try:
                await self._connect()
                log.info("connected to the store again")
            except StoreError as error:
                log.debug("store: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RECONNECT_MOST_S)

    async def settings(self) -> dict[str, str]:
        """The store's own settings that decide what a failure can cost."""
        names = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync")
        reply = await self.call("CONFIG", "GET", *names)
        texts = [text.decode() for text in reply]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    async def _check_settings(self) -> None:
        try:
            settings = await self.settings()
        except StoreRefused as error:  # managed stores forbid CONFIG
            log.warning("cannot read the store's settings: %s", error)
            return
        if settings.get("maxmemory", "0") != "0" and settings.get("maxmemory-policy") != "noeviction":
            raise StoreUnsuitable(
                f"the store may evict keys (maxmemory-policy {settings['maxmemory-policy']}) and would lose "
                "customers' credits: set maxmemory-policy noeviction"
            )
        if settings.get("appendonly") != "yes":
            log.warning("the store does not keep an append-only file: a crash of it loses credits (set appendonly yes)")

    async def _install(self) -> None:
        # Per-shard keys exist from the start: while a cluster slot migrates, a script whose declared key is
        # missing is refused on both nodes.
        calls = []
        for shard in range(SHARDS):
            keys = shard_keys(shard)
            calls += [
                self.call("HSETNX", keys.records, "", ""),
                self.call("ZADD", keys.due, "NX", 0, ""),
                self.call("HSETNX", keys.api_keys, "", ""),
                self.call("XGROUP", "CREATE", keys.ledger, "archive", 0, "MKSTREAM"),
            ]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not str(result).startswith("BUSYGROUP"):
                raise result
        await self.call("HSET", META, "layout", PREFIX, "shards", SHARDS)
