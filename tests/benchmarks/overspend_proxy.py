"""Two usual ways to keep a budget, as small proxies to compare with: ``python -m … POLICY STORE_SOCKET UPSTREAM_URL``.

count-after looks whether there is any budget left before it forwards a request, and takes the real cost off
afterwards. reserve-maximum holds what the request can cost at most, in one step, and settles. The key of a request is
its account; budget, used and held are nano-credits in the hash ``bench:ACCOUNT``.
"""

import json
import re
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import aiohttp
import uvloop
from aiohttp import web
from redis.asyncio import Redis

from tests.benchmarks.overspend_upstream import serve
from tests.gateway_process import cost_of

COUNT_AFTER, RESERVE_MAXIMUM = "count-after", "reserve-maximum"

_TAKE_COUNT_AFTER = """
local budget, used = unpack(redis.call('HMGET', KEYS[1], 'budget', 'used'))
return tonumber(used) < tonumber(budget) and 'admitted' or 'spent'
"""
_TAKE_RESERVE_MAXIMUM = """
local budget, used, held = unpack(redis.call('HMGET', KEYS[1], 'budget', 'used', 'held'))
local free, hold = tonumber(budget) - tonumber(used) - tonumber(held), tonumber(ARGV[1])
if free < hold then return free + tonumber(held) >= hold and 'busy' or 'spent' end
redis.call('HINCRBY', KEYS[1], 'held', hold)
return 'admitted'
"""
_SETTLE = """
redis.call('HINCRBY', KEYS[1], 'held', -ARGV[1])
return redis.call('HINCRBY', KEYS[1], 'used', ARGV[2])
"""
_USAGE = re.compile(rb'"prompt_tokens": (\d+), "completion_tokens": (\d+)')
_TAIL_BYTES = 1000


def _nano(credits: Decimal) -> int:
    return int(credits * 10**9)


class Proxy:
    """Answers /v1/chat/completions by its policy."""

    def __init__(self, policy: str, store: "Redis[Any]", upstream_url: str) -> None:
        self._holds = policy == RESERVE_MAXIMUM
        self._take = store.register_script(_TAKE_RESERVE_MAXIMUM if self._holds else _TAKE_COUNT_AFTER)
        self._settle = store.register_script(_SETTLE)
        self._upstream_url = upstream_url
        self._session: aiohttp.ClientSession

    def app(self) -> web.Application:
        """The server's application."""
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._answer)])
        app.cleanup_ctx.append(self._with_session)
        return app

    async def _with_session(self, _: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._session:
            yield

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        account = "bench:" + request.headers["Authorization"].removeprefix("Bearer ")
        raw = await request.read()
        # As the gateway does: every byte of the body may be a token.
        hold = _nano(cost_of(len(raw), json.loads(raw)["max_tokens"])) if self._holds else 0
        decision = await self._take(keys=[account], args=[hold])
        if decision != b"admitted":
            code = "credits_in_flight" if decision == b"busy" else "insufficient_quota"
            return web.json_response({"error": {"code": code}}, status=429)
        cost = 0
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            cost = await self._relay(request, raw, response)
        finally:
            await self._settle(keys=[account], args=[hold, cost])
        return response

    async def _relay(self, request: web.Request, raw: bytes, response: web.StreamResponse) -> int:
        """Pass the stream on; its cost in nano-credits."""
        tail = b""
        async with self._session.post(f"{self._upstream_url}/chat/completions", data=raw) as answer:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                tail = (tail + chunk)[-_TAIL_BYTES:]
                await response.write(chunk)
        usage = _USAGE.search(tail)
        assert usage is not None
        return _nano(cost_of(int(usage[1]), int(usage[2])))


async def _main(policy: str, socket: str, upstream_url: str) -> None:
    async with Redis(unix_socket_path=socket) as store:
        await serve(Proxy(policy, store, upstream_url).app())


if __name__ == "__main__":
    uvloop.run(_main(*sys.argv[1:]))
