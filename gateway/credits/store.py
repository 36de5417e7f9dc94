"""The store as the engine sees it: scripts and commands, whatever the arrangement of nodes behind its URL."""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from textwrap import indent
from typing import Any

from gateway.credits.addresses import read_url
from gateway.credits.cluster import Cluster
from gateway.credits.connection import Command, Connection, Reply, pack
from gateway.credits.errors import StoreRefused, StoreUnsuitable
from gateway.credits.keyspace import META, PREFIX, SHARDS, key_in, shard_keys
from gateway.credits.sentinel import SentinelLocator
from gateway.credits.single import FixedLocator, SinglePrimary
from gateway.credits.topology import Changed, Opener, Topology, code_of
from gateway.credits.wording import Wording
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

SCRIPTS = ("reserve", "extend", "settle", "release", "due", "create", "set_plan", "credit", "refund", "show")
_INCLUDE = re.compile(r"^--#include (.+)$", re.MULTILINE)
_ON_DEMAND = "--#on-demand"
_CONSTANT = re.compile(r"^local ([A-Z_]+) = ('[^'\n]*'|\d+)(?: *--.*)?\n", re.MULTILINE)
_FUNCTION = re.compile(r"^local function (\w+)\((.*?)\).*?^end\n", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"--.*")
_WORD = re.compile(r"\w+")
_SETTINGS = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync")
_SCAN_COUNT = 1000
_MOST_WORDINGS = 10_000  # of 2 KB each


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

    text = _tidied(_with_constants(_INCLUDE.sub(libraries, (folder / f"{name}.lua").read_text())))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _with_constants(text: str) -> str:
    """A script with its constants written where they are used: a function that uses a local of the script's takes it
    along when it is defined, at each call, which costs the store as much as the function itself."""
    constants = dict(_CONSTANT.findall(text))
    names = re.compile(rf"--.*|\b(?:{'|'.join(constants)})\b")
    return names.sub(lambda word: constants.get(word[0], word[0]), _CONSTANT.sub("", text))


def _tidied(text: str) -> str:
    """A script without the functions that it never calls, and with those that only one on demand calls inside that:
    every call of a script defines all its functions anew, which costs the store 0.15 µs each."""
    functions = list(_FUNCTION.finditer(text))
    called = _words(_FUNCTION.sub("", text))
    inside: dict[str, str] = {}  # a function on demand → those before it that nothing else calls
    for function in reversed(functions):  # each calls only those before it
        whole, name = function.group(0, 1)
        if name not in called:
            text = text.replace(whole, "")
        elif _ON_DEMAND in whole:
            inside[name] = whole
        else:
            called |= _words(whole)
    for whole in inside.values():
        text = text.replace(whole, _with_its_own(whole, functions, called | inside.keys()))
    return text


def _with_its_own(on_demand: str, functions: Sequence[re.Match[str]], outside: Set[str]) -> str:
    """A function on demand with all that it calls, but for what is outside, in itself."""
    called, own = _words(on_demand), ""
    for function in reversed(functions):
        whole, name = function.group(0, 1)
        if name in called and name not in outside:
            called |= _words(whole)
            own = indent(whole, "  ") + own
    head, _, body = on_demand.partition("\n")
    return f"{head}\n{own}{body}"


def _words(text: str) -> set[str]:
    return set(_WORD.findall(_COMMENT.sub("", text)))


class Store:
    """Runs the scripts on the store's primaries: one server, one that sentinels watch, or those of a cluster.

    Calls fail at once with StoreUnavailable while there is no connection to the node that they need. Nothing that may
    have run is ever sent twice from here, because only the caller knows what may be repeated.

    on_failover: called after calls go to another primary than before, or to one that was started again. It may lack
    the last writes of the one before, though they were answered.
    """

    def __init__(
        self,
        url: str,
        timeout_ms: int,
        metrics: Metrics,
        *,
        allow_unsafe: bool = False,
        scripts: Sequence[Script] | None = None,
    ) -> None:
        """url: as ``read_url`` takes it, which raises StoreUnsuitable. scripts: instead of the engine's."""
        self.on_failover: Callable[[], None] | None = None
        self._allow_unsafe = allow_unsafe
        self._timeout_ms = timeout_ms
        self._scripts = {script.name: script for script in scripts or map(load_script, SCRIPTS)}
        self._seconds = {name: metrics.store_seconds(name) for name in self._scripts}
        texts = [script.text for script in self._scripts.values()]
        self._topology = _topology(url, timeout_ms, texts, self._failed_over)
        #: The connection to the primary of a key, or to any without one. Raises StoreUnavailable if it is missing.
        self.primary_of = self._topology.primary_of
        #: The wording of an account's calls with a key, for a model, on a plan: its name and terms.
        self.wording: Callable[[str, str, str, str, str], Wording] = lru_cache(_MOST_WORDINGS)(self._wording)

    async def start(self) -> None:
        """Connect, check the settings of every primary, lay out the shards. Raises StoreError where that fails."""
        await self._topology.start()
        for connection in self._topology.primaries():
            await self._check_settings(connection)
        if not await self.call("EXISTS", META):
            await self._install()

    async def close(self) -> None:
        """Give up the connections."""
        await self._topology.close()

    async def call(self, *command: str | bytes | int) -> Reply:
        """One plain command: on the primary of the key in it, or without a key of ours (PING, TIME) on any.
        Raises StoreUnavailable or StoreRefused."""
        return await self._send(key_in(command), pack(*command))

    async def call_all(self, commands: Sequence[Command]) -> list[Reply]:
        """Many plain commands, written together; their replies in order. 3 µs each, where a task for each ``call``
        takes 7. Raises StoreUnavailable or StoreRefused for the first that fails, when all have an answer."""
        ways = [self.primary_of(key_in(command)) for command in commands]
        calls: list[asyncio.Future[Reply]] = []
        try:
            calls += (way.send(*command) for way, command in zip(ways, commands, strict=True))
        finally:  # also those before one that cannot be sent
            replies = await asyncio.gather(*calls, return_exceptions=True)
        for number, reply in enumerate(replies):
            if isinstance(reply, StoreRefused):  # it did not run, and ``call`` knows what to do about that
                replies[number] = await self.call(*commands[number])
            elif isinstance(reply, BaseException):
                raise reply
        return replies

    async def run(self, name: str, keys: tuple[str, ...], args: tuple[str | int, ...]) -> list[Any]:
        """One script; its keys share a slot. What it returns: texts as bytes, numbers as int. Raises
        StoreUnavailable or StoreRefused."""
        return await self.run_packed(name, keys[0], pack("EVALSHA", self._scripts[name].sha, len(keys), *keys, *args))

    async def run_packed(self, name: str, key: str, command: bytes) -> list[Any]:
        """Like ``run``, of an EVALSHA that is packed already; key: the first of the script's keys."""
        started = time.perf_counter()
        way = self.primary_of(key)
        try:
            reply = await way.write(command)
        except StoreRefused as refusal:
            reply = await self.run_again(name, way, refusal, key, command)
        self._seconds[name].observe(time.perf_counter() - started)
        return reply  # type: ignore[no-any-return]

    async def run_again(self, name: str, way: Connection, refusal: StoreRefused, key: str, command: bytes) -> Reply:
        """A script's reply after its call was refused on its way, where that proves that it did not run. Raises
        StoreUnavailable or StoreRefused."""
        try:
            if code_of(refusal) != "NOSCRIPT":
                return await self._topology.mend(way, refusal, key, command)
        except StoreRefused as again:
            if code_of(again) != "NOSCRIPT":
                raise
        # Flushed: the script did not run, so it may be sent again, whole.
        script = self._scripts[name]
        by_sha, by_text = _packed_words("EVALSHA", script.sha), _packed_words("EVAL", script.text)
        return await self._send(key, command.replace(by_sha, by_text, 1))

    def _wording(self, account: str, key_id: str, model: str, plan: str, terms: str) -> Wording:
        scripts = self._scripts
        return Wording(scripts["reserve"].sha, scripts["settle"].sha, account, key_id, model, plan, terms)

    async def _send(self, key: str | None, command: bytes) -> Reply:
        way = self.primary_of(key)
        try:
            return await way.write(command)
        except StoreRefused as refusal:
            return await self._topology.mend(way, refusal, key, command)

    async def scan(self, pattern: str) -> list[str]:
        """The keys that match a glob pattern, on all primaries, each once, in no order. A key that moves to another
        node meanwhile may be missing. Raises StoreUnavailable or StoreRefused."""
        found: set[str] = set()
        for connection in self._topology.primaries():
            cursor = b"0"
            while True:
                cursor, keys = await connection.send("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT)
                found.update(key.decode() for key in keys)
                if cursor == b"0":
                    break
        return list(found)

    async def replicated(self, key: str) -> bool:
        """Whether a replica has by now what was written to the key's primary from here: waits for half the timeout.
        True where the primary has no replica. Raises StoreUnavailable."""
        try:
            told = await self._send(key, pack("INFO", "replication"))
            if b"connected_slaves:0\r" in told:
                return True
            return int(await self._send(key, pack("WAIT", 1, self._timeout_ms // 2))) > 0
        except StoreRefused:  # managed stores forbid INFO or WAIT, and see to replication themselves
            return True

    async def wait_connected(self, timeout_s: float) -> bool:
        """Whether every primary has a connection within timeout_s."""
        connected = self._topology.connected
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await connected.wait()
        return connected.is_set()

    async def settings(self) -> dict[str, str]:
        """The store's own settings that decide what a failure can cost. Where primaries differ: all their values,
        joined by slashes. Raises StoreUnavailable, or StoreRefused where they are not told."""
        each = [await _settings_of(connection) for connection in self._topology.primaries()]
        return {name: "/".join(sorted({settings[name] for settings in each})) for name in each[0]}

    async def _check_settings(self, connection: Connection) -> None:
        try:
            settings = await _settings_of(connection)
        except StoreRefused as error:  # managed stores forbid CONFIG
            log.warning("cannot read the store's settings: %s", error)
            return
        mistakes = []
        if settings.get("maxmemory", "0") != "0" and settings.get("maxmemory-policy") != "noeviction":
            mistakes.append(
                f"the store may evict keys (maxmemory-policy {settings['maxmemory-policy']}) and would lose "
                "customers' credits: set maxmemory-policy noeviction"
            )
        if settings.get("appendonly") != "yes":
            mistakes.append("the store keeps no append-only file and loses credits when it stops: set appendonly yes")
        if mistakes and not self._allow_unsafe:
            raise StoreUnsuitable("; ".join([*mistakes, "or set store.allow_unsafe to start all the same"]))
        for mistake in mistakes:
            log.warning("%s", mistake)

    def _failed_over(self) -> None:
        log.warning("the store has another primary than before, or one that was started again")
        if self.on_failover is not None:
            try:
                self.on_failover()
            except Exception:  # whatever it is: it must not end the task that keeps the connection
                log.exception("what follows a failover failed")

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


def _topology(url: str, timeout_ms: int, script_texts: Sequence[str], changed: Changed) -> Topology:
    where = read_url(url)
    opener = Opener(timeout_ms, "cluster" if where.kind == "cluster" else "standalone", script_texts)
    match where.kind:
        case "cluster":
            return Cluster(where, timeout_ms, opener, changed)
        case "sentinel":
            return SinglePrimary(SentinelLocator(where, timeout_ms, opener), timeout_ms, changed)
        case "single":
            return SinglePrimary(FixedLocator(where.endpoint, opener), timeout_ms, changed)


def _packed_words(*words: str) -> bytes:
    """Some words of a packed command."""
    return pack(*words).partition(b"\r\n")[2]


async def _settings_of(connection: Connection) -> dict[str, str]:
    texts = [text.decode() for text in await connection.send("CONFIG", "GET", *_SETTINGS)]
    return dict(zip(texts[::2], texts[1::2], strict=True))
