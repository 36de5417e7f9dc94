"""What /chat/completions and /completions share: several choices, whole or streamed, and their usage."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from gateway.demo.answer import Answer, Tool, answer_of, call_of
from gateway.demo.events import DONE, event, stream_events
from gateway.demo.fields import Body, boolean, integer, made_id, texts
from gateway.demo.refusal import Refused, as_json
from gateway.demo.words import TOKEN_SECONDS, Prompt, words

MAX_N = 8
MAX_STOPS = 4


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked. tools: those that may be called. max_tokens: of each choice; None: no limit."""

    model: str
    prompts: tuple[Prompt, ...]
    tools: tuple[Tool, ...]
    n: int
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    running_usage: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers."""

    index: int
    answer: Answer

    @property
    def finish_reason(self) -> str:
        """As both endpoints name it."""
        if self.answer.cut:
            return "length"
        return "tool_calls" if self.answer.tool else "stop"


@dataclass(frozen=True, slots=True)
class Form:
    """What differs between the two endpoints: names, and the shape of one choice.

    pieces: the choice in pieces, each with the number of tokens in it.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[Choice], Body]
    pieces: Callable[[Choice], Iterator[tuple[Body, int]]]


def question(body: Body, prompts: tuple[Prompt, ...], tools: tuple[Tool, ...] = ()) -> Question:
    """The question in a body. Raises Refused."""
    limit = integer(body, "max_completion_tokens")
    stream = boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused("stream_options must be an object", "stream_options")
    if options is not None and not stream:
        raise Refused("stream_options is only allowed when stream is true", "stream_options")
    return Question(
        model=body["model"],
        prompts=prompts,
        tools=tools,
        n=integer(body, "n", MAX_N) or 1,
        max_tokens=integer(body, "max_tokens") if limit is None else limit,
        stops=texts(body, "stop", MAX_STOPS),
        stream=stream,
        include_usage=boolean(options or {}, "include_usage"),
        running_usage=boolean(options or {}, "continuous_usage_stats"),
    )


async def answer(request: web.Request, asked: Question, form: Form) -> web.StreamResponse:
    """The answer, whole or streamed."""
    choices = _choices(asked)
    frame = {
        "id": made_id(f"{form.id_prefix}-demo-", await request.read()),
        "object": form.chunk_object if asked.stream else form.whole_object,
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": "quota-gateway-demo",
    }
    if asked.stream:
        return await stream_events(request, _events(frame, asked, choices, form))
    tokens = sum(len(choice.answer.tokens) for choice in choices)
    return as_json({**frame, "choices": [form.whole(choice) for choice in choices], "usage": _usage(asked, tokens)})


def _choices(asked: Question) -> list[Choice]:
    answers = [
        call_of(asked.tools, prompt.text, asked.max_tokens)
        or answer_of(words(prompt.text, nth), asked.max_tokens, asked.stops)
        for prompt in asked.prompts
        for nth in range(asked.n)
    ]
    return [Choice(index, given) for index, given in enumerate(answers)]


def _usage(asked: Question, completion: int) -> Body:
    prompt = sum(prompt.tokens for prompt in asked.prompts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(frame: Body, asked: Question, choices: Sequence[Choice], form: Form) -> AsyncIterator[bytes]:
    usage: Body = {"usage": None} if asked.include_usage else {}
    sent = 0
    for choice in choices:
        for piece, tokens in form.pieces(choice):
            sent += tokens
            if asked.running_usage:
                usage = {"usage": _usage(asked, sent)}
            yield event({**frame, "choices": [piece], **usage})
            await asyncio.sleep(TOKEN_SECONDS)
    if asked.include_usage:
        yield event({**frame, "choices": [], "usage": _usage(asked, sent)})
    yield DONE
