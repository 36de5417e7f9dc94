"""What stands between the gateway and an upstream that a test did not write, and notes every request that arrives."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

_SECONDS = 30
#: Said by each side of the connection for itself.
_HOP_BY_HOP = ("Host", "Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Server", "Date")


@dataclass(frozen=True)
class Arrived:
    """A request as the upstream gets it. status: of its answer, None if there was none."""

    path: str
    headers: Mapping[str, str]
    body: Any
    status: int | None


@dataclass
class Counter:
    """Passes everything on to target and back. base_url: where it listens, without a path, as target is."""

    target: str
    base_url: str = ""
    arrived: list[Arrived] = field(default_factory=list)

    async def pass_on(self, request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
        """Answer as the target does, and break off where it breaks off."""
        body = await request.read()
        note = (request.path, request.headers.copy(), json.loads(body) if body else None)
        url = self.target + request.raw_path
        try:
            async with session.request(request.method, url, data=body, headers=_end_to_end(request.headers)) as answer:
                self.arrived.append(Arrived(*note, answer.status))
                response = web.StreamResponse(status=answer.status, headers=_end_to_end(answer.headers))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except aiohttp.ClientError:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError from None


@contextmanager
def counting(targets: Mapping[str, str]) -> Iterator[dict[str, Counter]]:
    """A counter in front of each target ("http://HOST:PORT"), in a thread of their own until the block ends."""
    counters = {name: Counter(target) for name, target in targets.items()}
    ready, loop = threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        # A new connection for each: none that the target has just closed.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            runners = [await _listen(counter, session) for counter in counters.values()]
            ready.set()
            await over.wait()
            for runner in runners:
                await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(_SECONDS)
        yield counters
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(_SECONDS)
        loop.close()


async def _listen(counter: Counter, session: aiohttp.ClientSession) -> web.AppRunner:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await counter.pass_on(request, session)

    app = web.Application(client_max_size=2**25)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    counter.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept
