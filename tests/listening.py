"""A server of aiohttp on the loopback interface."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def listening(of: web.Server) -> AsyncIterator[int]:
    """The port on which the server listens until the block ends."""
    runner = web.ServerRunner(of, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
