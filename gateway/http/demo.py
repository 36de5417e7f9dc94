"""The demo model: a small OpenAI-like upstream that answers offline, so that the first command needs no key.

It is no language model and says so in every answer. The same request always gets the same words. What it cannot do
(images, tools, sampling) it either refuses or ignores; it never pretends.

A token is up to six letters or digits together with the space before them, or one other character. Hence a text
never has more tokens than UTF-8 bytes, and the tokens of an answer joined are the answer.
"""

import asyncio
import base64
import hashlib
import math
import re
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_N = 8
MAX_PROMPTS = 16
MAX_STOPS = 4
MAX_INPUTS = 2048
DIMENSIONS = 32

#: Slow enough to be seen arriving, fast enough not to be waited for.
TOKEN_SECONDS = 0.01

_ECHO_CHARACTERS = 60
_MODELS = web.AppKey("models", tuple[str, ...])
_TOKEN = re.compile(r" ?\w{1,6}|\W")
_LABEL = "This is the demo model of the quota gateway, not a language model."
_REMARKS = (
    "The gateway held credits before it passed the request on, and charges what these tokens cost.",
    "Configure an upstream and its key to get answers from a real model.",
    "The same question always gets the same answer.",
    "Set max_tokens to get a shorter one.",
    "Set stream to true to see it arrive token by token.",
)

_Body = dict[str, Any]


class _Refused(Exception):
    """The request gets an OpenAI-shaped error."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class DemoUpstream:
    """The demo model on a free loopback port while its ``async with`` block runs.

    base_url ("http://127.0.0.1:PORT/v1") is there once the block is entered.
    """

    base_url: str

    def __init__(self, models: Sequence[str]) -> None:
        self._runner = web.AppRunner(demo_app(models), access_log=None, shutdown_timeout=1)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
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
    """The demo model under the names in models, at /v1/models, chat/completions, completions and embeddings."""
    app = web.Application(middlewares=[_as_openai_errors], client_max_size=MAX_BODY_BYTES)
    app[_MODELS] = tuple(models)
    app.router.add_get("/v1/models", _list_models)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _complete)
    app.router.add_post("/v1/embeddings", _embed)
    return app


def split_tokens(text: str) -> list[str]:
    """The tokens of text, which joined are text: at most one per UTF-8 byte."""
    return _TOKEN.findall(text)


# --- handlers -------------------------------------------------------------------------------------------------------


@web.middleware
async def _as_openai_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Refused as refused:
        return _error(refused)
    except web.HTTPException as failure:
        return _error(_Refused(f"demo model: {failure.reason}", status=failure.status))


def _error(refused: _Refused) -> web.Response:
    error = {
        "message": refused.message,
        "type": "invalid_request_error",
        "param": refused.param,
        "code": refused.code,
    }
    return _json({"error": error}, refused.status)


def _json(value: _Body, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def _list_models(request: web.Request) -> web.Response:
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "quota-gateway-demo"} for name in request.app[_MODELS]
    ]
    return _json({"object": "list", "data": data})


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await _read(request)
    return await _answer(request, _question(body, (_conversation(body),)), _CHAT)


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await _read(request)
    prompts = _texts_or_ids(body, "prompt", MAX_PROMPTS)
    return await _answer(request, _question(body, prompts), _TEXT)


async def _embed(request: web.Request) -> web.Response:
    body = await _read(request)
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise _Refused("encoding_format must be float or base64", "encoding_format")
    inputs = _texts_or_ids(body, "input", MAX_INPUTS)
    if not all(item.tokens for item in inputs):
        raise _Refused("input must not be empty", "input")
    data = []
    for index, item in enumerate(inputs):
        vector = _unit_vector(item.text)
        packed = base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed if encoding == "base64" else vector})
    tokens = sum(item.tokens for item in inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "model": body["model"], "data": data, "usage": usage})


def _unit_vector(text: str) -> list[float]:
    # 16-bit halves of a hash, shifted by a half so that no vector is zero.
    digest = hashlib.shake_256(text.encode()).digest(2 * DIMENSIONS)
    raw = [number + 0.5 for number in struct.unpack(f"<{DIMENSIONS}h", digest)]
    length = math.hypot(*raw)
    return [number / length for number in raw]


# --- what was asked -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prompt:
    """text: what the answer echoes. tokens: what the whole prompt counts."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class _Question:
    model: str
    prompts: tuple[_Prompt, ...]
    n: int
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    running_usage: bool


async def _read(request: web.Request) -> _Body:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise _Refused(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise _Refused("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str):
        raise _Refused("model must be a string", "model")
    if model not in request.app[_MODELS]:
        raise _Refused(f"The model {model!r} does not exist", "model", status=404, code="model_not_found")
    return body


def _question(body: _Body, prompts: tuple[_Prompt, ...]) -> _Question:
    limit = _integer(body, "max_completion_tokens", 2**31)
    stream = _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _Refused("stream_options must be an object", "stream_options")
    if options is not None and not stream:
        raise _Refused("stream_options is only allowed when stream is true", "stream_options")
    return _Question(
        model=body["model"],
        prompts=prompts,
        n=_integer(body, "n", MAX_N) or 1,
        max_tokens=_integer(body, "max_tokens", 2**31) if limit is None else limit,
        stops=_stops(body),
        stream=stream,
        include_usage=_boolean(options or {}, "include_usage"),
        running_usage=_boolean(options or {}, "continuous_usage_stats"),
    )


def _integer(body: _Body, name: str, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise _Refused(f"{name} must be an integer from 1 to {most}", name)
    return value


def _boolean(body: _Body, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _Refused(f"{name} must be true or false", name)
    return bool(value)


def _stops(body: _Body) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _Refused(f"stop must be a text or a list of at most {MAX_STOPS} texts, none empty", "stop")
    return tuple(stops)


def _conversation(body: _Body) -> _Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages must be a list of at least one message", "messages")
    last, tokens = "", 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refused("a message must be an object with a role", f"messages[{index}]")
        text = _content(message.get("content"), f"messages[{index}].content")
        tokens += len(split_tokens(text))
        if message["role"] == "user":
            last = text
    return _Prompt(last, tokens)


def _content(content: object, param: str) -> str:
    if content is None:
        return ""  # an assistant's message that only calls tools
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _Refused("content must be a text or a list of parts", param)
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise _Refused("the demo model reads only text parts", param)
    return "".join(str(text) for text in texts)


def _texts_or_ids(body: _Body, name: str, most: int) -> tuple[_Prompt, ...]:
    """The four ways to give text: a text, a list of texts, a list of token ids, a list of such lists."""
    value = body.get(name)
    items = value if isinstance(value, list) and not _are_ids(value) else [value]
    if len(items) > most:
        raise _Refused(f"{name} must have at most {most} entries", name)
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(_Prompt(item, len(split_tokens(item))))
        elif isinstance(item, list) and _are_ids(item):
            prompts.append(_Prompt(f"token ids {item}", len(item)))
        else:
            raise _Refused(f"{name} must be a text, a list of texts, or one or more lists of token ids", name)
    return _not_empty(prompts, name)


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int and item >= 0 for item in value)


def _not_empty(prompts: list[_Prompt], name: str) -> tuple[_Prompt, ...]:
    if not prompts:
        raise _Refused(f"{name} must not be empty", name)
    return tuple(prompts)


# --- the answer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Choice:
    index: int
    tokens: tuple[str, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class _Api:
    """What differs between the two completion endpoints: names, and the shape of one choice."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[_Choice], _Body]
    pieces: Callable[[_Choice], Iterator[_Body]]


def _choices(question: _Question) -> list[_Choice]:
    return [
        _choice(question, text, index)
        for index, text in enumerate(
            _words(prompt.text, nth) for prompt in question.prompts for nth in range(question.n)
        )
    ]


def _words(asked: str, nth: int) -> str:
    """Label, echo and one to five remarks, by the length of what was asked; nth turns the remarks round."""
    echo = " ".join(asked.split())
    if len(echo) > _ECHO_CHARACTERS:
        echo = echo[:_ECHO_CHARACTERS] + "…"
    count = 1 + len(split_tokens(asked)) % len(_REMARKS)
    remarks = [_REMARKS[(nth + offset) % len(_REMARKS)] for offset in range(count)]
    return " ".join([_LABEL, f'You wrote: "{echo}".', *remarks])


def _choice(question: _Question, text: str, index: int) -> _Choice:
    ends = [text.find(stop) for stop in question.stops if stop in text]
    tokens = split_tokens(text[: min(ends, default=len(text))])
    if question.max_tokens is not None and len(tokens) > question.max_tokens:
        return _Choice(index, tuple(tokens[: question.max_tokens]), "length")
    return _Choice(index, tuple(tokens), "stop")


def _usage(question: _Question, completion: int) -> _Body:
    prompt = sum(prompt.tokens for prompt in question.prompts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _length(choices: Sequence[_Choice]) -> int:
    return sum(len(choice.tokens) for choice in choices)


async def _answer(request: web.Request, question: _Question, api: _Api) -> web.StreamResponse:
    choices = _choices(question)
    frame = {
        "id": f"{api.id_prefix}-demo-{hashlib.sha256(await request.read()).hexdigest()[:24]}",
        "object": api.chunk_object if question.stream else api.whole_object,
        "created": int(time.time()),
        "model": question.model,
        "system_fingerprint": "quota-gateway-demo",
    }
    if not question.stream:
        whole = [api.whole(choice) for choice in choices]
        return _json({**frame, "choices": whole, "usage": _usage(question, _length(choices))})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for event in _events(frame, question, choices, api):
            await response.write(b"data: " + event + b"\n\n")
        await response.write_eof()
    except ConnectionResetError:
        pass  # the reader has left; there is nobody to tell
    return response


async def _events(frame: _Body, question: _Question, choices: Sequence[_Choice], api: _Api) -> AsyncIterator[bytes]:
    usage: _Body = {"usage": None} if question.include_usage else {}
    sent = 0
    for choice in choices:
        for piece in api.pieces(choice):
            sent += bool((piece.get("delta") or {}).get("content") or piece.get("text"))
            if question.running_usage:
                usage = {"usage": _usage(question, sent)}
            yield orjson.dumps({**frame, "choices": [piece], **usage})
            await asyncio.sleep(TOKEN_SECONDS)
    if question.include_usage:
        yield orjson.dumps({**frame, "choices": [], "usage": _usage(question, _length(choices))})
    yield b"[DONE]"


def _chat_whole(choice: _Choice) -> _Body:
    message = {"role": "assistant", "content": "".join(choice.tokens), "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}


def _chat_pieces(choice: _Choice) -> Iterator[_Body]:
    deltas: list[_Body] = [{"role": "assistant", "content": ""}, *({"content": token} for token in choice.tokens), {}]
    for delta in deltas:
        finish = None if delta else choice.finish_reason
        yield {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _text_whole(choice: _Choice) -> _Body:
    return _text_piece(choice, "".join(choice.tokens), choice.finish_reason)


def _text_pieces(choice: _Choice) -> Iterator[_Body]:
    for token in choice.tokens:
        yield _text_piece(choice, token, None)
    yield _text_piece(choice, "", choice.finish_reason)


def _text_piece(choice: _Choice, text: str, finish_reason: str | None) -> _Body:
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish_reason}


_CHAT = _Api("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_whole, _chat_pieces)
_TEXT = _Api("cmpl", "text_completion", "text_completion", _text_whole, _text_pieces)
