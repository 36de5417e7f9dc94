"""The overspend benchmark's upstream: streams answers of known lengths and counts every token that it writes."""

import asyncio
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import uvloop
from aiohttp import web

from tests.benchmarks.overspend_load import WORD, request_of
from tests.upstreams.process import READY

#: 400 tokens a second and stream, each token an event.
TOKENS_PER_WRITE, PAUSE_S = 4, 0.01

_FRAME = {"id": "bench-1", "object": "chat.completion.chunk", "created": 1, "model": "bench"}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({**_FRAME, **document}).encode() + b"\n\n"


_TOKEN = _event({"choices": [{"index": 0, "delta": {"content": WORD}, "finish_reason": None}]})
_SHAPE = {"Content-Type": "text/event-stream"}


@dataclass
class Truth:
    """What was read and written for an account. open: how many of its requests are being answered."""

    prompt_tokens: int = 0
    written_tokens: int = 0
    open: int = 0


class Upstream:
    """Answers /v1/chat/completions, and /v1/truth/ACCOUNT to the benchmark."""

    def __init__(self) -> None:
        self._truths: dict[str, Truth] = defaultdict(Truth)

    def app(self) -> web.Application:
        """The server's application."""
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._answer), web.get("/v1/truth/{account}", self._tell)])
        return app

    async def _tell(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(self._truths[request.match_info["account"]]))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        truth = self._truths[body["user"].split()[0]]
        truth.open += 1
        try:
            return await self._stream(request, body, truth)
        finally:
            truth.open -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], truth: Truth) -> web.StreamResponse:
        asked = request_of(*body["user"].split())
        tokens = min(asked.natural_tokens, body["max_tokens"])
        truth.prompt_tokens += asked.prompt_tokens
        response = web.StreamResponse(headers=_SHAPE)
        await response.prepare(request)
        left = tokens
        while left:
            await asyncio.sleep(PAUSE_S)
            now = min(left, TOKENS_PER_WRITE)
            await response.write(_TOKEN * now)
            truth.written_tokens += now
            left -= now
        await response.write(_ending(asked.prompt_tokens, tokens, at_limit=tokens == body["max_tokens"]))
        return response


def _ending(prompt_tokens: int, tokens: int, *, at_limit: bool) -> bytes:
    reason = "length" if at_limit else "stop"
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    finish = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return finish + _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


async def serve(app: web.Application) -> None:
    """Answer on a free loopback port, and say on which, until the process is ended."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"{READY}http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(Upstream().app()))
