"""POST /moderations: flags nothing."""

from aiohttp import web

from gateway.demo.fields import Body, content_text, made_id, read_body
from gateway.demo.refusal import Refused, as_json

MAX_INPUTS = 2048
DEFAULT_MODEL = "omni-moderation-latest"

_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)


async def moderate(request: web.Request) -> web.Response:
    """A result for each text, or one for a list of parts."""
    body = await read_body(request, default_model=DEFAULT_MODEL)
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.0),
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }
    identity = made_id("modr-demo-", await request.read())
    return as_json({"id": identity, "model": body["model"], "results": [result] * _count(body)})


def _count(body: Body) -> int:
    given = body.get("input")
    if isinstance(given, str):
        return 1
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise Refused(f"input must be a text, or a list of 1 to {MAX_INPUTS} texts or parts", "input")
    if all(isinstance(item, str) for item in given):
        return len(given)
    content_text(given, "input")
    return 1
