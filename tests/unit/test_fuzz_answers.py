"""Whole answers of any shape from an upstream, of every endpoint: each is of no use, or charged within its bound."""

import json
from typing import Any

import pytest
from hypothesis import strategies as st

from gateway.apis.registry import APIS
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.http.forwarding import _error_of
from tests.unit.fuzzing import FEW_OR_MANY, JSON, Json, fuzz, tampered

USAGE = {
    "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 1},
}  # fmt: skip
USED = {
    "input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2,
    "input_tokens_details": {"cached_tokens": 3}, "output_tokens_details": {"reasoning_tokens": 2},
}  # fmt: skip
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART = {"type": "output_text", "text": "Hello"}
ANSWERS: dict[str, list[Json]] = {
    "/chat/completions": [
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}}], "usage": USAGE},
        {"choices": [{"index": 0, "message": {"role": "assistant", "tool_calls": [CALL]}}, {}]},
    ],
    "/completions": [{"choices": [{"index": 0, "text": "Hello"}, {"index": 1, "text": ""}], "usage": USAGE}],
    "/embeddings": [{"data": [{"embedding": [0.5, 1.0]}, {"embedding": "AAAA"}], "usage": USAGE}],
    "/messages": [
        {"type": "message", "content": [{"type": "text", "text": "Hello"}], "stop_sequence": "x", "usage": USED},
        {"type": "message", "content": [{"type": "tool_use", "name": "f", "input": {"a": 1}}]},
    ],
    "/rerank": [
        {"results": [{"index": 0, "relevance_score": 0.5}], "meta": {"billed_units": {"search_units": 2}}},
        {"data": [{"index": 0}], "usage": {"total_tokens": 7}},
    ],
    "/responses": [
        {"status": "completed", "output": [{"type": "message", "content": [PART]}], "usage": USED},
        {"status": "incomplete", "output": [{"type": "function_call", "name": "f", "arguments": "{}"}, {"type": "x"}]},
    ],
}
NAMES = tuple(sorted({*USAGE, *USED, "error", "usage", "choices", "message", "content", "output", "status", "data"}))
INPUT_TOKENS, OUTPUT_TOKENS = 500, 400


def bounds(path: str) -> st.SearchStrategy[Bound]:
    has_output = path not in ("/embeddings", "/rerank")
    answers = st.integers(1, 3) if has_output else st.just(0)
    return answers.map(lambda count: Bound(INPUT_TOKENS, count, OUTPUT_TOKENS, units=Metered(requests=2)))


def check_within(metered: Metered, bound: Bound) -> None:
    most = bound.metered(bound.output_tokens_each)
    assert metered.input <= most.input
    assert metered.output <= most.output
    assert metered.requests <= most.requests
    assert min(metered.plain_input, metered.plain_output, *metered.figures().values()) >= 0


@FEW_OR_MANY
@pytest.mark.parametrize("path", ANSWERS)
def test_an_answer_is_of_no_use_or_charged_within_its_bound(path: str, examples: int) -> None:
    @fuzz(examples, tampered(st.sampled_from(ANSWERS[path]) | JSON, NAMES), bounds(path), st.integers(1, 5))
    def check(document: Json, bound: Bound, prompts: int) -> None:
        raw = json.dumps(document).encode()
        answer = APIS[path].read_answer(raw)
        assert answer is None or isinstance(document, dict)
        if answer is not None:
            ask = Ask("chat", "m", 2000, prompts=prompts, completions=bound.answers)
            check_within(answer.metered(ask, bound), bound)
            assert answer.empty or answer.metered(ask, bound).requests


@FEW_OR_MANY
@pytest.mark.parametrize("path", ANSWERS)
def test_an_answer_that_says_something_is_not_free(path: str, examples: int) -> None:
    """Whatever the upstream makes of its usage."""

    @fuzz(examples, st.sampled_from(ANSWERS[path]), JSON, bounds(path))
    def check(document: dict[str, Any], usage: Json, bound: Bound) -> None:
        raw = json.dumps({**document, "usage": usage}).encode()
        answer = APIS[path].read_answer(raw)
        assert answer is not None
        metered = answer.metered(Ask("chat", "m", 2000, completions=bound.answers), bound)
        assert metered.requests
        if answer.usage is None:
            assert metered.input > 0
            assert metered.output > 0 or not bound.answers


@FEW_OR_MANY
@pytest.mark.parametrize("path", ANSWERS)
def test_no_bytes_are_too_strange(path: str, examples: int) -> None:
    whole = st.sampled_from([json.dumps(answer).encode() for answer in ANSWERS[path]])
    numbers = st.sampled_from([b"1e999", b"9" * 30, b"-5", b"NaN", b'"\\ud800"', b"[" * 2000, b"\0", b"\xff", b""])

    @fuzz(examples, whole, st.integers(0, 300), st.integers(0, 40), numbers | st.binary(max_size=5))
    def check(raw: bytes, place: int, length: int, instead: bytes) -> None:
        broken = raw[:place] + instead + raw[place + length :]
        answer = APIS[path].read_answer(broken)
        bound = Bound(INPUT_TOKENS, 0 if path in ("/embeddings", "/rerank") else 1, OUTPUT_TOKENS)
        if answer is not None:
            check_within(answer.metered(Ask("chat", "m", 2000), bound), bound)
        assert isinstance(_error_of(broken), dict)
