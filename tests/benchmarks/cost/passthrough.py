"""The yardstick: a proxy of aiohttp alone that does nothing but pass on. ``python -m … UPSTREAM_BASE_URL [uvloop]``.

It runs as aiohttp does by itself, on the event loop of the standard library; or on uvloop, as the gateway does, to tell
what is the loop's part and what the gateway's.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

from tests.upstreams.process import READY


def passthrough(upstream: str) -> web.Application:
    """Passes /v1/* on to upstream."""

    async def session(app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as client:
            app["client"] = client
            yield

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in ("Content-Type", "Authorization") if name in request.headers}
        target = upstream + request.path.removeprefix("/v1")
        async with request.app["client"].request(request.method, target, data=body, headers=headers) as answer:
            kind = {"Content-Type": answer.headers["Content-Type"]}
            if answer.content_type != "text/event-stream":
                return web.Response(status=answer.status, body=await answer.read(), headers=kind)
            response = web.StreamResponse(status=answer.status, headers=kind)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=2**26)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/v1/{path:.*}", handle)
    return app


async def serve(app: web.Application) -> None:
    """Answer on a free loopback port, and say on which, until the process is ended."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"{READY}http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    run = uvloop.run if sys.argv[2:] == ["uvloop"] else asyncio.run
    run(serve(passthrough(sys.argv[1])))
