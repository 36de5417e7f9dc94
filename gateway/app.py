"""Composition root: what is made, in which order, and how it is closed."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from gateway.config.model import Address, GatewayConfig, Secret, Upstream
from gateway.config.watch import LiveConfig
from gateway.credits.api_keys import new_secret
from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.archiver import Archiver, ForeignArchive, archiving
from gateway.credits.auditor import Auditor, auditing
from gateway.credits.embedded import EmbeddedStore, EmbeddedStoreError, running_url
from gateway.credits.errors import Rejected, StoreError, StoreUnavailable
from gateway.credits.journal import Journal
from gateway.credits.operator import Operator
from gateway.credits.reaper import reap
from gateway.credits.service import CreditEngine
from gateway.credits.store import Store
from gateway.http.admin import Check, Health, admin_app
from gateway.http.demo import DemoUpstream
from gateway.http.proxy import Proxy
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient, UpstreamError

T = TypeVar("T")

log = logging.getLogger(__name__)

#: On shutdown: how long requests in flight may go on, then how long their settlements may take.
DRAIN_S = 25.0
SETTLE_S = 5.0
#: How long the start waits for a store that was lost again.
START_WAIT_S = 10.0
FIRST_ACCOUNT = "default"
_BORROW_TRIES, _BORROW_PAUSE_S = 20, 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    component: str
    ok: bool
    detail: str


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
        store = await stack.enter_async_context(_store(config, metrics, serving=True))
        archive = Archive(config.archive.url, config.store.data_dir)
        await stack.enter_async_context(archiving(store, archive, metrics))
        await _claim(config, Archiver(store, archive, metrics))
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
        operator = Operator(store, config.plans, config.default_plan)
        secret = await _first_key(config, store, operator)
        if config.store.embedded:
            started_ms = await _patiently(store, operator.now_ms)
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
        server = web.Server(proxy.handle, handler_cancellation=True, access_log=None)
        data = web.ServerRunner(server, shutdown_timeout=1)
        address = await _listen(stack, data, config.listen, "listen")
        await stack.enter_async_context(_running(live.follow()))
        print(_welcome(config, address, admin_address, secret), flush=True)
        await stop.wait()
        log.info("stopping: requests in flight have %d s; a second signal cuts them", DRAIN_S)
        for site in list(data.sites):
            await site.stop()
        server.pre_shutdown()
        await proxy.drain(DRAIN_S, hurry, SETTLE_S)


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first signal to stop, and for the second. A closed terminal stops like Ctrl-C."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def heed() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, heed)
    return stop, hurry


@asynccontextmanager
async def audit_session(config: GatewayConfig) -> AsyncIterator[Auditor]:
    """The ledger's readers, on the same store as ``operator_session`` and on the archive. Raises ArchiveError."""
    async with (
        _store(config, Metrics(config.plans, config.models), serving=False) as store,
        auditing(store, config.archive.url, config.store.data_dir) as auditor,
    ):
        yield auditor


@asynccontextmanager
async def operator_session(config: GatewayConfig) -> AsyncIterator[Operator]:
    """The operator's use cases, on the running gateway's store or on one started for the time of the block."""
    async with _store(config, Metrics(config.plans, config.models), serving=False) as store:
        yield Operator(store, config.plans, config.default_plan)


async def diagnose(config: GatewayConfig) -> list[Finding]:
    """Look at everything that serving needs. Raises nothing: what fails is a finding."""
    findings = []
    if config.store.embedded and not config.store.data_dir.exists():
        findings.append(Finding("store", False, f"{config.store.data_dir.resolve()} does not exist: serve makes it"))
        return findings + await _diagnose_upstreams(config)
    try:
        async with _store(config, Metrics(config.plans, config.models), serving=False) as store:
            findings += await _diagnose_store(config, store)
    except Exception as error:
        findings.append(Finding("store", False, str(error)))
    return findings + await _diagnose_upstreams(config)


async def _diagnose_upstreams(config: GatewayConfig) -> list[Finding]:
    if config.demo:
        text = "demo mode: with the environment of this shell no upstream has a key, and the demo model answers"
        return [Finding("upstreams", True, text)]
    client = UpstreamClient()
    try:
        return [await _diagnose_upstream(config, client, name) for name in config.upstreams]
    finally:
        await client.close()


def _shown_store(config: GatewayConfig) -> str:
    """Which store this is, fit for logs."""
    return f"embedded in {config.store.data_dir.resolve()}" if config.store.embedded else config.store.shown_url


async def _diagnose_store(config: GatewayConfig, store: Store) -> list[Finding]:
    seconds, micros = await store.call("TIME")
    skew_ms = abs(time.time() * 1000 - int(seconds) * 1000 - int(micros) / 1000)
    findings = [
        Finding("store", True, f"{_shown_store(config)} answers"),
        Finding("clocks", skew_ms < 60_000, f"store and gateway differ by {skew_ms:.0f} ms (a refresh needs < 60000)"),
    ]
    with suppress(StoreError):
        settings = await store.settings()
        durable = settings.get("appendonly") == "yes"
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        findings.append(Finding("durability", durable, shown if durable else f"{shown}: a crash loses credits"))
    return findings


async def _diagnose_upstream(config: GatewayConfig, client: UpstreamClient, name: str) -> Finding:
    component = f"upstream {name}"
    try:
        async with client.send(config.upstreams[name], "GET", "/models", {}) as answer:
            listed = answer.status == 200
            return Finding(component, listed, f"GET /models answers {answer.status}")
    except UpstreamError as error:
        return Finding(component, False, str(error))


@asynccontextmanager
async def _store(config: GatewayConfig, metrics: Metrics, *, serving: bool) -> AsyncIterator[Store]:
    """A started Store: of the configured URL, or of an embedded server that is started here if none runs yet."""
    async with AsyncExitStack() as stack:
        url = config.store.url
        if config.store.embedded:
            url = await _embedded_url(config.store.data_dir, stack, borrow=not serving)
        store = Store(url, config.store.timeout_ms, metrics, allow_unsafe=config.store.allow_unsafe)
        stack.push_async_callback(store.close)
        await store.start()
        yield store


async def _embedded_url(data_dir: Path, stack: AsyncExitStack, *, borrow: bool) -> str:
    """The URL of the embedded server: one that runs already, if it may be borrowed, else one started here."""
    tries_left = _BORROW_TRIES if borrow else 1
    while True:
        if borrow and (url := running_url(data_dir)):
            return url
        if borrow:
            _say_if_new(data_dir)
        server = EmbeddedStore(data_dir)
        try:
            await server.start()
        except EmbeddedStoreError:
            # Another verb may just be starting or ending its own.
            tries_left -= 1
            if not tries_left:
                raise
            await asyncio.sleep(_BORROW_PAUSE_S)
        else:
            stack.push_async_callback(server.stop)
            return server.url


def _say_if_new(data_dir: Path) -> None:
    # A verb in the wrong directory would otherwise succeed, unnoticed, on a store that no gateway serves.
    if not data_dir.exists():
        print(f"quota-gateway: making a new store in {data_dir.resolve()}", file=sys.stderr)


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
        if self._server is None or not self._models.issuperset(config.models):
            self._models |= frozenset(config.models)
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


async def _claim(config: GatewayConfig, archiver: Archiver) -> None:
    """Find out at the start whether the archive is that of this store. A database server that is away may come back."""
    try:
        await archiver.claim()
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


async def _first_key(config: GatewayConfig, store: Store, operator: Operator) -> str | None:
    """On the first start of an empty embedded store: an account with a key, so that there is something to try."""
    if not config.store.embedded:
        return None
    existing = await _patiently(store, operator.accounts)
    if existing:
        return None
    secret = new_secret()
    # One that exists now was made by a try whose reply was lost.
    with suppress(Rejected):
        await _patiently(store, lambda: operator.create_account(FIRST_ACCOUNT))
    with suppress(Rejected):
        await _patiently(store, lambda: operator.create_key(FIRST_ACCOUNT, "first", secret))
    return secret


async def _patiently(store: Store, attempt: Callable[[], Awaitable[T]]) -> T:
    """Until the store has answered, or for START_WAIT_S: a busy machine must not keep the gateway from starting.
    Raises StoreError."""
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            if time.monotonic() >= deadline or not await store.wait_connected(START_WAIT_S):
                raise


def _reachable(address: Address) -> Address:
    """An address that a client on this machine can use."""
    return Address("127.0.0.1", address.port) if address.host in ("0.0.0.0", "::") else address  # noqa: S104


def _welcome(config: GatewayConfig, address: Address, admin: Address, secret: str | None) -> str:
    base = f"http://{_reachable(address)}/v1"
    lines = []
    if config.demo:
        lines += [
            f"DEMO MODEL: no upstream has a key ({', '.join(config.upstreams)}), so a small built-in model answers, at",
            "the same prices. Set the key that the configuration asks for (IONET_API_KEY) to serve real models.",
            "",
        ]
    lines += [f"metrics   http://{_reachable(admin)}/metrics", f"base URL  {base}"]
    if secret is None:
        lines.append(
            "key       make one with: quota-gateway keys create ACCOUNT, after accounts create ACCOUNT (same --config)"
        )
        return "\n".join(lines)
    model = next((model for model in config.models.values() if model.prices.output_femto), None)
    lines.append(f"key       {secret}   (account {FIRST_ACCOUNT}, plan {config.default_plan}; shown only once)")
    if model is not None:
        body = f'{{"model": "{model.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        lines += [
            "try it    " + f"curl -i {base}/chat/completions \\",
            f"            -H 'Authorization: Bearer {secret}' -H 'Content-Type: application/json' \\",
            f"            -d '{body}'",
        ]
    return "\n".join(lines)
