"""What a request that cannot be answered gets: an error in the shape of the API that was asked."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MESSAGES = "/v1/messages"

_ANTHROPIC_TYPES = {404: "not_found_error", 413: "request_too_large"}


class Refused(Exception):
    """The request is refused with status. param: the field that it is about; code: a word for programs."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@web.middleware
async def errors_in_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what a handler refuses, and what aiohttp does, in the shape of the API."""
    try:
        return await handler(request)
    except Refused as refused:
        return _error(request, refused)
    except web.HTTPException as failure:
        return _error(request, Refused(f"demo model: {failure.reason}", status=failure.status))


def as_json(value: dict[str, Any], status: int = 200) -> web.Response:
    """An answer of one JSON object."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _error(request: web.Request, refused: Refused) -> web.Response:
    if request.path.startswith(MESSAGES):
        kind = _ANTHROPIC_TYPES.get(refused.status, "invalid_request_error")
        error = {"type": kind, "message": refused.message}
        return as_json({"type": "error", "error": error, "request_id": "req_demo"}, refused.status)
    return as_json({"error": error_of(refused)}, refused.status)


def error_of(refused: Refused) -> dict[str, Any]:
    """The error as OpenAI's APIs say it."""
    return {
        "message": refused.message,
        "type": "invalid_request_error",
        "param": refused.param,
        "code": refused.code,
    }
