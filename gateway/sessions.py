"""Opens the store: for a gateway that serves, or for one verb of the command line.

Only an embedded store makes a difference: a gateway has it to itself, while a verb borrows the running gateway's, or
starts the server for the time that it takes.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from gateway.config.load import OperatorConfig
from gateway.config.model import StoreConfig
from gateway.credits.auditor import Auditor, auditing
from gateway.credits.embedded import EmbeddedStore, EmbeddedStoreError, running_url
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics

_BORROW_TRIES, _BORROW_PAUSE_S = 20, 0.1
#: What Valkey makes in the data directory as soon as it runs there.
_APPEND_ONLY_DIR = "appendonlydir"


class NoStore(EmbeddedStoreError):
    """The data directory has no embedded store, and the verb is not one that makes one."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(
            f"there is no store in {data_dir.resolve()}: name another directory with --data-dir; "
            "`quota-gateway serve` or `quota-gateway accounts create` makes a new one"
        )


@asynccontextmanager
async def operator_session(config: OperatorConfig, *, create: bool) -> AsyncIterator[Operator]:
    """The operator's use cases. create: whether to make a new embedded store where there is none.

    Raises NoStore, EmbeddedStoreError and StoreError.
    """
    async with borrowed_store(config.store, create=create) as store:
        yield Operator(store, config.plans or {}, config.default_plan)


@asynccontextmanager
async def audit_session(config: OperatorConfig) -> AsyncIterator[Auditor]:
    """The ledger's readers, on store and archive, which must be known.

    Raises NoStore, EmbeddedStoreError, StoreError and ArchiveError."""
    assert config.archive is not None
    async with (
        borrowed_store(config.store) as store,
        auditing(store, config.archive.url, config.store.data_dir) as auditor,
    ):
        yield auditor


@asynccontextmanager
async def running_store(config: StoreConfig) -> AsyncIterator[StoreConfig]:
    """Where the store is, for a gateway that serves: an embedded one is started, is its own, and has its server's URL
    from here on. Raises EmbeddedStoreError."""
    if not config.embedded:
        yield config
        return
    server = EmbeddedStore(config.data_dir)
    await server.start()
    try:
        yield replace(config, url=server.url)
    finally:
        await server.stop()


@asynccontextmanager
async def started_store(config: StoreConfig, metrics: Metrics) -> AsyncIterator[Store]:
    """A connection to a store that runs. Raises StoreError."""
    async with AsyncExitStack() as stack:
        yield await _started(config.url, config, metrics, stack)


@asynccontextmanager
async def borrowed_store(config: StoreConfig, *, create: bool = False) -> AsyncIterator[Store]:
    """A started store for the time of the block, for one that does not serve. create: whether to make a new embedded
    store where there is none. Raises NoStore, EmbeddedStoreError, StoreError."""
    async with AsyncExitStack() as stack:
        url = config.url
        if config.embedded:
            if not has_store(config.data_dir):
                if not create:
                    raise NoStore(config.data_dir)
                # In the wrong directory it would otherwise succeed, unnoticed, on a store that no gateway serves.
                print(f"quota-gateway: making a new store in {config.data_dir.resolve()}", file=sys.stderr)
            url = await _borrowed_url(config.data_dir, stack)
        yield await _started(url, config, Metrics((), ()), stack)


def has_store(data_dir: Path) -> bool:
    """Whether an embedded store has ever run there; also True where that cannot be seen, which opening it explains."""
    try:
        (data_dir / _APPEND_ONLY_DIR).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


async def _started(url: str, config: StoreConfig, metrics: Metrics, stack: AsyncExitStack) -> Store:
    store = Store(url, config.timeout_ms, metrics, allow_unsafe=config.allow_unsafe)
    stack.push_async_callback(store.close)
    await store.start()
    return store


async def _borrowed_url(data_dir: Path, stack: AsyncExitStack) -> str:
    """The URL of the embedded server that runs already, or of one that is started here."""
    tries_left = _BORROW_TRIES
    while True:
        if url := running_url(data_dir):
            return url
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
