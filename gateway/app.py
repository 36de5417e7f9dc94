"""Composition root: what is made, in which order, and how it is closed."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

from aiohttp import web

from gateway.config.model import Address, GatewayConfig, Secret, Upstream
from gateway.config.watch import LiveConfig
from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.archiver import Archiver, ForeignArchive, archiving
from gateway.credits.errors import StoreError
from gateway.credits.journal import Journal
from gateway.credits.operator import Operator
from gateway.credits.reaper import reap
from gateway.credits.service import CreditEngine
from gateway.credits.store import Store
from gateway.demo.upstream import DemoUpstream
from gateway.http.admin import Check, Health, admin_app
from gateway.http.proxy import Proxy
from gateway.http.server import DataServer
from gateway.sessions import own_store
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient
from gateway.welcome import first_key, patiently, welcome

log = logging.getLogger(__name__)

#: On shutdown: how long requests in flight may go on, then how long their settlements may take.
DRAIN_S = 25.0
SETTLE_S = 5.0


class ListenError(Exception):
    """A listener's address cannot be had; the text names the address, the cause and the setting."""


async def serve(config: GatewayConfig, read: Callable[[], GatewayConfig]) -> None:
    """Run the gateway until SIGTERM or SIGINT. Requests in flight are drained and settled before it returns.

    read: reads the configuration again, as config was read; called in a thread when its files change. Raises
    EmbeddedStoreError, StoreError, ArchiveError, JournalError and ListenError where it cannot start.
    """
    stop, hurry = _stop_signals()
    async with AsyncExitStack() as stack:
        metrics = Metrics(config.plans, config.models)
        store = await stack.enter_async_context(own_store(config.store, metrics))
        await stack.enter_async_context(_archiving(config, store, metrics))
        engine = await stack.enter_async_context(_credit_engine(config, store, metrics))
        operator = Operator(store, config.plans, config.default_plan)
        secret = await first_key(config, store, operator)
        if config.store.embedded:
            started_ms = await patiently(store, operator.now_ms)
            await stack.enter_async_context(_running(_abandon_orphans(operator, started_ms)))
        demo = _Demo(stack)
        client = UpstreamClient()
        stack.push_async_callback(client.close)
        proxy = Proxy(await demo.served(config), engine, client, metrics)

        async def apply(fresh: GatewayConfig) -> None:
            served = await demo.served(fresh)
            # Without an await between them: a request sees all of the old configuration or all of the new one.
            engine.use(fresh.plans, fresh.default_plan)
            metrics.use(fresh.plans, fresh.models)
            proxy.use(served)

        live = LiveConfig(config, read, apply, metrics.config_reloaded)
        health = Health({"store": _store_check(store), "gateway": _running_check(stop)})
        admin_server = admin_app(health, metrics, lambda: live.config.admin.token, live.reload)
        admin = web.AppRunner(admin_server, shutdown_timeout=1, access_log=None)
        admin_address = await _listen(stack, admin, config.admin.listen, "admin.listen")
        data = web.ServerRunner(DataServer(proxy), shutdown_timeout=1)
        address = await _listen(stack, data, config.listen, "listen")
        await stack.enter_async_context(_running(live.follow()))
        print(welcome(config, address, admin_address, secret), flush=True)
        await stop.wait()
        log.info("stopping: requests in flight have %d s; a second signal cuts them", DRAIN_S)
        for site in list(data.sites):
            await site.stop()
        # Connections stay open meanwhile: aiohttp closes none in which a body is still on its way without losing that.
        await proxy.drain(DRAIN_S, hurry, SETTLE_S)


@asynccontextmanager
async def _archiving(config: GatewayConfig, store: Store, metrics: Metrics) -> AsyncIterator[None]:
    """The ledger moves into its archive for the time of the block. Raises ArchiveError where it may not."""
    archive = Archive(config.archive.url, config.store.data_dir)
    async with archiving(store, archive, metrics):
        await _claim(config, store, Archiver(store, archive, metrics))
        yield


@asynccontextmanager
async def _credit_engine(config: GatewayConfig, store: Store, metrics: Metrics) -> AsyncIterator[CreditEngine]:
    """The engine and all that it does by itself: leases that it keeps and ends, settlements that journals kept."""
    async with AsyncExitStack() as stack:
        journal = Journal(config.store.data_dir / "journal")
        await journal.open()
        stack.push_async_callback(journal.close)
        engine = CreditEngine(store, config.plans, config.default_plan, metrics, journal)
        metrics.watch_reservations_open(lambda: engine.open_reservations)
        stack.push_async_callback(_settle_all, engine)
        await stack.enter_async_context(_running(reap(engine)))
        await stack.enter_async_context(_running(engine.keep_leases()))
        if left := await engine.replay():
            log.warning("telling the store of %d settlements that another gateway left in its journal", left)
        await stack.enter_async_context(_running(engine.adopt_journals()))
        yield engine


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first signal to stop, and for the second. A closed terminal stops like Ctrl-C."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def heed() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, heed)
    return stop, hurry


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


@asynccontextmanager
async def _running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


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


async def _settle_all(engine: CreditEngine) -> None:
    if left := await engine.close(SETTLE_S):
        log.error(
            "%d settlements did not reach the store in time; the next gateway here reads them in the journal",
            left,
        )


async def _listen(stack: AsyncExitStack, runner: web.BaseRunner, address: Address, setting: str) -> Address:
    """Open a listener; the address with the port that it got."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, address.host, address.port).start()
    except OSError as error:
        cause = (error.strerror or str(error)).rpartition(": ")[2]
        option = "--" + setting.replace(".", "-")
        raise ListenError(
            f"cannot listen on {address}: {cause}; choose another address with {option} or as {setting}"
        ) from error
    return Address(address.host, runner.addresses[0][1])


async def _abandon_orphans(operator: Operator, started_ms: int) -> None:
    """A gateway that was killed left holds. With the store to ourselves nobody will settle them: why wait for their
    leases?"""
    try:
        if count := await operator.abandon_orphans(started_ms):
            log.warning("ended %d requests of a killed gateway; what was seen of them was charged", count)
    except StoreError as error:
        log.warning("the holds of a killed gateway stay until their leases end: %s", error)


def _store_check(store: Store) -> Check:
    async def check() -> str | None:
        try:
            await store.call("PING")
        except StoreError as error:
            return str(error)
        return None

    return check


def _running_check(stop: asyncio.Event) -> Check:
    async def check() -> str | None:
        return "stopping" if stop.is_set() else None

    return check
