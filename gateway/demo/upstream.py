"""The demo model as a server."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self
from weakref import WeakSet

from aiohttp import web

from gateway.demo.chat import chat
from gateway.demo.completions import complete
from gateway.demo.embeddings import embed
from gateway.demo.fields import MAX_BODY_BYTES, MODELS
from gateway.demo.images import edit, generate, vary
from gateway.demo.messages import count_input as count_message
from gateway.demo.messages import message
from gateway.demo.moderations import moderate
from gateway.demo.realtime import SOCKETS, close_sockets, talk
from gateway.demo.refusal import as_json, errors_in_shape
from gateway.demo.rerank import rerank
from gateway.demo.responses import count_input as count_response
from gateway.demo.responses import respond
from gateway.demo.speech import speak
from gateway.demo.transcriptions import transcribe, translate

_POSTS = {
    "/chat/completions": chat,
    "/completions": complete,
    "/embeddings": embed,
    "/responses": respond,
    "/responses/input_tokens": count_response,
    "/messages": message,
    "/messages/count_tokens": count_message,
    "/moderations": moderate,
    "/rerank": rerank,
    "/images/generations": generate,
    "/images/edits": edit,
    "/images/variations": vary,
    "/audio/speech": speak,
    "/audio/transcriptions": transcribe,
    "/audio/translations": translate,
}


class DemoUpstream:
    """The demo model on a loopback port (0: a free one) while its ``async with`` block runs.

    base_url ("http://127.0.0.1:PORT/v1") is there once the block is entered.
    """

    base_url: str

    def __init__(self, models: Sequence[str], port: int = 0) -> None:
        self._runner = web.AppRunner(demo_app(models), access_log=None, shutdown_timeout=1)
        self._port = port

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()


def demo_app(models: Sequence[str]) -> web.Application:
    """The demo model under the names in models: every endpoint of the API, below /v1."""
    app = web.Application(middlewares=[errors_in_shape], client_max_size=MAX_BODY_BYTES)
    app[MODELS] = tuple(models)
    app[SOCKETS] = WeakSet()
    app.on_shutdown.append(close_sockets)
    app.router.add_get("/v1/models", _list_models)
    app.router.add_get("/v1/realtime", talk)
    for path, handler in _POSTS.items():
        app.router.add_post(f"/v1{path}", handler)
    return app


async def _list_models(request: web.Request) -> web.Response:
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "quota-gateway-demo"} for name in request.app[MODELS]
    ]
    return as_json({"object": "list", "data": data})
