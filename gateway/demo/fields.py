"""Reading a JSON body: each reader checks one kind of field and refuses by its name."""

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from gateway.demo.refusal import Refused
from gateway.demo.words import Prompt, count_tokens

#: More than any API takes in one body.
MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_COUNT = 2**31

#: The names that the demo model answers to.
MODELS = web.AppKey("models", tuple[str, ...])

Body = dict[str, Any]


async def read_body(request: web.Request, *, default_model: str | None = None) -> Body:
    """The body, whose model is one of ours. default_model: what a body without one means. Raises Refused."""
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    if default_model is not None and body.get("model") is None:
        return {**body, "model": default_model}
    check_model(request, body.get("model"))
    return body


def check_model(request: web.Request, model: object) -> str:
    """The model's name, if it is one of ours. Raises Refused."""
    if not isinstance(model, str):
        raise Refused("model must be a string", "model")
    if model not in request.app[MODELS]:
        raise Refused(f"The model {model!r} does not exist", "model", status=404, code="model_not_found")
    return model


def made_id(prefix: str, asked: bytes) -> str:
    """An id for the answer to what was asked: the same for the same request."""
    return f"{prefix}{hashlib.sha256(asked).hexdigest()[:24]}"


def integer(body: Body, name: str, most: int = MAX_COUNT, least: int = 1) -> int | None:
    """A whole number from least to most, or None where there is none. Raises Refused."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"{name} must be an integer from {least} to {most}", name)
    return value


def boolean(body: Body, name: str) -> bool:
    """False where there is none. Raises Refused."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false", name)
    return bool(value)


def text(body: Body, name: str) -> str | None:
    """A text, or None where there is none. Raises Refused."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name} must be a text", name)
    return value


def required_text(body: Body, name: str, most: int) -> str:
    """A text of 1 to most characters. Raises Refused."""
    value = text(body, name)
    if not value or len(value) > most:
        raise Refused(f"{name} must be a text of 1 to {most} characters", name)
    return value


def one_of(body: Body, name: str, choices: Sequence[str]) -> str:
    """One of the choices; the first where there is none. Raises Refused."""
    value = body.get(name)
    if value is None:
        return choices[0]
    if value not in choices:
        raise Refused(f"{name} must be {' or '.join(choices)}", name)
    return str(value)


def texts(body: Body, name: str, most: int) -> tuple[str, ...]:
    """A text, or a list of at most most texts, none empty. Raises Refused."""
    value = body.get(name)
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > most or not all(isinstance(s, str) and s for s in found):
        raise Refused(f"{name} must be a text or a list of at most {most} texts, none empty", name)
    return tuple(found)


def objects(body: Body, name: str, most: int) -> list[Body]:
    """A list of at most most objects; empty where there is none. Raises Refused."""
    value = body.get(name)
    found = [] if value is None else value
    if not isinstance(found, list) or len(found) > most or not all(isinstance(item, dict) for item in found):
        raise Refused(f"{name} must be a list of at most {most} objects", name)
    return found


def content_text(content: object, param: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a message's content: a text, or a list of text parts of the given kinds. Raises Refused."""
    if content is None:
        return ""  # an assistant's message that only calls tools
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused("content must be a text or a list of parts", param)
    found = [part.get("text") if isinstance(part, dict) and part.get("type") in kinds else None for part in content]
    if not all(isinstance(text, str) for text in found):
        raise Refused("the demo model reads only text parts", param)
    return "".join(str(text) for text in found)


def texts_or_ids(body: Body, name: str, most: int) -> tuple[Prompt, ...]:
    """The four ways to give text: a text, a list of texts, a list of token ids, a list of such lists."""
    value = body.get(name)
    items = value if isinstance(value, list) and not _are_ids(value) else [value]
    if len(items) > most:
        raise Refused(f"{name} must have at most {most} entries", name)
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(Prompt(item, count_tokens(item)))
        elif isinstance(item, list) and _are_ids(item):
            prompts.append(Prompt(f"token ids {item}", len(item)))
        else:
            raise Refused(f"{name} must be a text, a list of texts, or one or more lists of token ids", name)
    if not prompts:
        raise Refused(f"{name} must not be empty", name)
    return tuple(prompts)


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int and item >= 0 for item in value)
