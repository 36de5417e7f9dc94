"""The gateway's store as tests open it, for the time of a block."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from gateway.credits.store import Script, Store
from gateway.telemetry.metrics import Metrics


@asynccontextmanager
async def started_store(
    url: str,
    metrics: Metrics,
    timeout_ms: int = 5000,
    *,
    allow_unsafe: bool = False,
    scripts: Sequence[Script] | None = None,
) -> AsyncIterator[Store]:
    """A started store; scripts: instead of the engine's. Raises StoreError."""
    store = Store(url, timeout_ms, metrics, allow_unsafe=allow_unsafe, scripts=scripts)
    try:
        await store.start()
        yield store
    finally:
        await store.close()
