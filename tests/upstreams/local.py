"""An upstream in the test's own loop, which the test can look into."""

from types import TracebackType
from typing import Self

from aiohttp import web

#: More than the gateway lets through.
_MOST_BYTES = 64 * 2**20


class LocalUpstream:
    """Answers on a free port of loopback for the time of a block.

    base_url ("http://127.0.0.1:PORT/v1") is there once the block is entered. Answers that are under way at its end are
    cancelled.
    """

    base_url: str

    def __init__(self, *routes: web.AbstractRouteDef) -> None:
        app = web.Application(client_max_size=_MOST_BYTES)
        app.add_routes(routes)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
