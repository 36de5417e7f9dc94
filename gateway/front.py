"""The data listener, and all that answers behind it in one process."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from gateway.config.model import Address, GatewayConfig
from gateway.credits.errors import StoreError
from gateway.credits.journal import Journal
from gateway.credits.service import CreditEngine
from gateway.credits.store import Store
from gateway.http.admin import Check
from gateway.http.proxy import Proxy
from gateway.http.server import DataServer
from gateway.lifetime import DRAIN_S, SETTLE_S, keep_freed_memory, running, spare_garbage_collection
from gateway.listening import BACKLOG, listen, stop_listening
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient

log = logging.getLogger(__name__)


@asynccontextmanager
async def credit_engine(config: GatewayConfig, store: Store, metrics: Metrics) -> AsyncIterator[CreditEngine]:
    """An engine for this process's requests, with a journal of its own; at the end their settlements have a moment to
    arrive. Raises JournalError."""
    async with AsyncExitStack() as stack:
        journal = Journal(config.store.data_dir / "journal")
        await journal.open()
        stack.push_async_callback(journal.close)
        engine = CreditEngine(store, config.plans, config.default_plan, metrics, journal)
        metrics.watch_reservations_open(lambda: engine.open_reservations)
        stack.push_async_callback(_settle_all, engine)
        await stack.enter_async_context(running(engine.keep_leases()))
        yield engine


async def _settle_all(engine: CreditEngine) -> None:
    if left := await engine.close(SETTLE_S):
        log.error(
            "%d settlements did not reach the store in time; the next gateway here reads them in the journal",
            left,
        )


def store_check(store: Store) -> Check:
    """Whether the store answers."""

    async def check() -> str | None:
        try:
            await store.call("PING")
        except StoreError as error:
            return str(error)
        return None

    return check


class Front:
    """Answers clients. Nothing else is called before one of the two opens, and nothing after close."""

    #: What must work for it, beside the store: nothing.
    checks: Mapping[str, Check] = {}

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._inherited: Sequence[socket.socket] = ()
        self._stack = AsyncExitStack()

    async def open(self, served: GatewayConfig, engine: CreditEngine) -> Address:
        """Answer at the configuration's address; that with the port that it got. Raises ListenError."""
        self._prepare(served, engine)
        return await listen(self._stack, self._runner, served.listen, "listen")

    async def open_on(self, served: GatewayConfig, engine: CreditEngine, sockets: Sequence[socket.socket]) -> None:
        """Answer on sockets that another process has bound, and goes on to hold."""
        self._prepare(served, engine)
        self._inherited = sockets
        await self._runner.setup()
        self._stack.push_async_callback(self._runner.cleanup)
        for sock in sockets:
            await web.SockSite(self._runner, sock, backlog=BACKLOG).start()

    def _prepare(self, served: GatewayConfig, engine: CreditEngine) -> None:
        client = UpstreamClient()
        self._stack.push_async_callback(client.close)
        self._engine = engine
        self._proxy = Proxy(served, engine, client, self._metrics)
        self._runner = web.ServerRunner(DataServer(self._proxy), shutdown_timeout=1)
        spare_garbage_collection()
        keep_freed_memory()

    async def use(self, served: GatewayConfig) -> None:
        """Answer new requests by another configuration."""
        # Without an await between them: a request sees all of the old configuration or all of the new one.
        self._engine.use(served.plans, served.default_plan)
        self._metrics.use(served.plans, served.models)
        self._proxy.use(served)

    async def scrape(self, accept: str | None) -> tuple[bytes, str]:
        """The metrics, as ``Metrics.expose`` has them."""
        return self._metrics.expose(accept)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Take no more connections. Requests in flight may end, for DRAIN_S or until hurry is set; the rest is cut."""
        for sock in self._inherited:
            stop_listening(sock)
        for site in list(self._runner.sites):
            await site.stop()
        # Connections stay open meanwhile: aiohttp closes none in which a body is still on its way without losing that.
        await self._proxy.drain(DRAIN_S, hurry, SETTLE_S)

    async def close(self) -> None:
        """Let go of listeners and connections."""
        await self._stack.aclose()
