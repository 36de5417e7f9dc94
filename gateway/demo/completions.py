"""POST /completions."""

from collections.abc import Iterator

from aiohttp import web

from gateway.demo.completion import Choice, Form, answer, question
from gateway.demo.fields import Body, read_body, texts_or_ids

MAX_PROMPTS = 16


async def complete(request: web.Request) -> web.StreamResponse:
    """One or more answers to each prompt."""
    body = await read_body(request)
    return await answer(request, question(body, texts_or_ids(body, "prompt", MAX_PROMPTS)), _FORM)


def _whole(choice: Choice) -> Body:
    return _piece(choice, choice.answer.text, choice.finish_reason)


def _pieces(choice: Choice) -> Iterator[tuple[Body, int]]:
    for token in choice.answer.tokens:
        yield _piece(choice, token, None), 1
    yield _piece(choice, "", choice.finish_reason), 0


def _piece(choice: Choice, text: str, finish_reason: str | None) -> Body:
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish_reason}


_FORM = Form("cmpl", "text_completion", "text_completion", _whole, _pieces)
