"""Composition root: what is made, in which order, and how it is closed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from aiohttp import web

from gateway.config.model import Address, GatewayConfig, Secret, Upstream
from gateway.config.watch import LiveConfig
from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.archiver import Archiver, ForeignArchive, archiving
from gateway.credits.errors import StoreError
from gateway.credits.operator import Operator
from gateway.credits.reaper import reap
from gateway.credits.service import CreditEngine
from gateway.credits.store import Store
from gateway.demo.upstream import DemoUpstream
from gateway.front import Front, credit_engine, store_check
from gateway.http.admin import Check, Health, admin_app
from gateway.lifetime import DRAIN_S, running, stop_signals
from gateway.listening import listen
from gateway.sessions import running_store, started_store
from gateway.telemetry.metrics import Metrics
from gateway.welcome import first_key, patiently, welcome
from gateway.workers.team import Team

log = logging.getLogger(__name__)


class Answering(Protocol):
    """What answers clients: this process (``Front``), or worker processes (``Team``)."""

    @property
    def checks(self) -> Mapping[str, Check]:
        """What must work beside the store for it to answer."""

    async def open(self, served: GatewayConfig, engine: CreditEngine) -> Address:
        """Begin; the address with the port that it got."""

    async def use(self, served: GatewayConfig) -> None:
        """Answer new requests by another configuration, all of them once this returns."""

    async def scrape(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics of all that answers."""

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let requests in flight end."""

    async def close(self) -> None:
        """Let go of what open has opened."""


async def serve(config: GatewayConfig, read: Callable[[], GatewayConfig], workers: int = 1) -> None:
    """Run the gateway until SIGTERM or SIGINT. Requests in flight are drained and settled before it returns.

    read: reads the configuration again, as config was read; called in a thread when its files change. workers: how many
    processes answer; 1: this one does. Raises EmbeddedStoreError, StoreError, ArchiveError, JournalError, ListenError
    and WorkerFailed where it cannot start.
    """
    stop, hurry = stop_signals()
    async with AsyncExitStack() as stack:
        metrics = Metrics(config.plans, config.models)
        front = await _front(config, metrics, workers, stack)
        at = await stack.enter_async_context(running_store(config.store))
        store = await stack.enter_async_context(started_store(at, metrics))
        archiver = await stack.enter_async_context(_archiving(config, store, metrics))
        engine = await stack.enter_async_context(credit_engine(config, store, metrics))
        if workers == 1:  # of requests to workers this process knows nothing
            archiver.quiet = lambda: engine.quiet
        await stack.enter_async_context(_tending(engine))
        operator = Operator(store, config.plans, config.default_plan)
        secret = await first_key(config, store, operator)
        if config.store.embedded:
            started_ms = await patiently(store, operator.now_ms)
            await stack.enter_async_context(running(_abandon_orphans(operator, started_ms)))
        demo = _Demo(stack)
        stack.push_async_callback(front.close)

        async def served_by(fresh: GatewayConfig) -> GatewayConfig:
            return replace(await demo.served(fresh), store=at)

        async def apply(fresh: GatewayConfig) -> None:
            await front.use(await served_by(fresh))

        live = LiveConfig(config, read, apply, metrics.config_reloaded)
        health = Health({"store": store_check(store), "gateway": _running_check(stop), **front.checks})
        admin_server = admin_app(health, front.scrape, lambda: live.config.admin.token, live.reload)
        admin = web.AppRunner(admin_server, shutdown_timeout=1, access_log=None)
        admin_address = await listen(stack, admin, config.admin.listen, "admin.listen")
        address = await front.open(await served_by(config), engine)
        await stack.enter_async_context(running(live.follow()))
        print(welcome(config, address, admin_address, secret), flush=True)
        await stop.wait()
        log.info("stopping: requests in flight have %d s; a second signal cuts them", DRAIN_S)
        await front.drain(hurry)


async def _front(config: GatewayConfig, metrics: Metrics, workers: int, stack: AsyncExitStack) -> Answering:
    """What will answer clients. Workers are started first of all: they read the program while the store starts."""
    if workers == 1:
        return Front(metrics)
    team = Team(workers, config.listen, metrics)
    stack.push_async_callback(team.close)
    await team.start()
    return team


@asynccontextmanager
async def _archiving(config: GatewayConfig, store: Store, metrics: Metrics) -> AsyncIterator[Archiver]:
    """The ledger moves into its archive for the time of the block. Raises ArchiveError where it may not."""
    archive = Archive(config.archive.url, config.store.data_dir)
    async with archiving(store, archive, metrics) as archiver:
        await _claim(config, store, archiver)
        yield archiver


@asynccontextmanager
async def _tending(engine: CreditEngine) -> AsyncIterator[None]:
    """For the time of the block: what ended processes left is ended, leases that ran out and journals that nobody has
    the lock of. Raises JournalError."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(reap(engine)))
        if left := await engine.replay():
            log.warning("telling the store of %d settlements that another gateway left in its journal", left)
        await stack.enter_async_context(running(engine.adopt_journals()))
        yield


class _Demo:
    """Stands in for all upstreams while none has a key.

    A model that it does not know takes another demo server; the one before runs on for the requests in flight.
    """

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._server: DemoUpstream | None = None
        self._models: frozenset[str] = frozenset()

    async def served(self, config: GatewayConfig) -> GatewayConfig:
        """The configuration to serve by: itself, or with every upstream replaced by the demo model."""
        if not config.demo:
            return config
        log.warning("no upstream has a key (%s): the demo model answers and is charged", ", ".join(config.upstreams))
        # It is asked by the names that the upstreams would know.
        names = {model.sent_as or name for name, model in config.models.items()}
        if self._server is None or not self._models.issuperset(names):
            self._models |= names
            self._server = await self._stack.enter_async_context(DemoUpstream(sorted(self._models)))
        base_url = self._server.base_url

        def stand_in(upstream: Upstream) -> Upstream:
            return replace(upstream, base_url=base_url, api_key=Secret("demo"))

        return replace(config, upstreams={name: stand_in(upstream) for name, upstream in config.upstreams.items()})


async def _claim(config: GatewayConfig, store: Store, archiver: Archiver) -> None:
    """Find out at the start whether the archive is that of this store. A database server that is away may come back."""
    try:
        await patiently(store, archiver.claim)
    except ForeignArchive:
        raise
    except ArchiveError as error:
        if config.archive.url.startswith("sqlite"):
            raise
        log.error("the ledger stays in the store for now: %s", error)


async def _abandon_orphans(operator: Operator, started_ms: int) -> None:
    """A gateway that was killed left holds. With the store to ourselves nobody will settle them: why wait for their
    leases?"""
    try:
        if count := await operator.abandon_orphans(started_ms):
            log.warning("ended %d requests of a killed gateway; what the store was told of them was charged", count)
    except StoreError as error:
        log.warning("the holds of a killed gateway stay until their leases end: %s", error)


def _running_check(stop: asyncio.Event) -> Check:
    async def check() -> str | None:
        return "stopping" if stop.is_set() else None

    return check
