"""What is charged for an answer: never less than nothing, never more than the bound, whatever the upstream says."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.registry import APIS
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound, Operation
from gateway.upstream.usage import (
    Answer,
    Usage,
    billed,
    billed_without_usage,
    exceeds,
    read_embeddings_usage,
    read_usage,
)
from tests.unit.figures import used

BOUND = Bound(input_tokens=100, answers=2, output_tokens_each=10)
ASK = Ask("chat", "m", input_bytes=41)


def read_answer(body: bytes, operation: Operation) -> Answer | None:
    return next(api for api in APIS.values() if api.name == operation).read_answer(body)


OPERATIONS: list[Operation] = ["chat", "text_completion", "embeddings"]

_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), _FLOATS, st.text(max_size=5))
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_USAGES = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": _JSON | st.integers(0, 200),
        "completion_tokens": _JSON | st.integers(0, 200),
        "total_tokens": _JSON,
        "prompt_tokens_details": _JSON
        | st.fixed_dictionaries({}, optional={"cached_tokens": _JSON, "cache_write_tokens": st.integers(-5, 200)}),
        "completion_tokens_details": _JSON,
    },
)
_BOUNDS = st.builds(Bound, st.integers(0, 10**7), st.integers(0, 300), st.integers(0, 10**7), st.booleans())
_MESSAGES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "content", "refusal", "tool_calls", "reasoning"), _JSON)
)
_CHOICES = _JSON | st.fixed_dictionaries(
    {}, optional={"message": _JSON | _MESSAGES, "text": _JSON, "embedding": _JSON, "index": _JSON}
)
_ANSWERS = _JSON | st.fixed_dictionaries(
    {},
    optional={
        "choices": _JSON | st.lists(_CHOICES, max_size=3),
        "data": _JSON | st.lists(_CHOICES, max_size=3),
        "usage": _JSON | _USAGES,
        "error": _JSON,
    },
)


def within(tokens: Metered, bound: Bound) -> bool:
    most = bound.metered(bound.output_tokens_each)
    return (
        0 <= tokens.input <= most.input
        and 0 <= tokens.output <= most.output
        and 0 <= tokens.cache_read <= tokens.input
        and min(tokens.figures().values(), default=0) >= 0
        and tokens.plain_input >= 0
        and tokens.plain_output >= 0
    )


# --- usage ----------------------------------------------------------------------------------------------------------


def test_a_usual_usage_is_billed_as_it_is() -> None:
    said = {
        "prompt_tokens": 90,
        "completion_tokens": 20,
        "total_tokens": 110,
        "prompt_tokens_details": {
            "cached_tokens": 80,
            "cache_write_tokens": 3,
            "audio_tokens": 4,
            "image_tokens": 2,
        },
        "completion_tokens_details": {"reasoning_tokens": 15, "audio_tokens": 2, "image_tokens": 1},
    }
    usage = read_usage(said)
    assert usage == Usage(90, 20, 80, 3, 15, 4, 2, 2, 1)
    given = {"cache_read": 80, "cache_write": 3, "audio_input": 4, "image_input": 2}
    kinds = {**given, "audio_output": 2, "image_output": 1, "reasoning": 15}
    assert billed(usage, ASK, BOUND) == Metered(input=90, output=20, **kinds, requests=1)


def test_parts_never_come_to_more_than_the_whole() -> None:
    metered = billed(Usage(50, 12, 40, 30, 99, 98, 10, 97, 1), ASK, BOUND)
    parts = {"cache_read": 40, "cache_write": 10, "audio_output": 10, "image_output": 1, "reasoning": 1}
    assert metered == Metered(50, 12, **parts, requests=1)
    metered = billed(Usage(50, 12, 10, 10, 99, 20, 5, 97, 99), ASK, BOUND)
    parts = {"cache_read": 10, "cache_write": 10, "audio_input": 20, "image_input": 10}
    assert metered == Metered(50, 12, **parts, audio_output=5, image_output=7, requests=1)


@pytest.mark.parametrize("completion", [{}, {"completion_tokens": None}, {"completion_tokens": 0}])
def test_embeddings_have_no_output(completion: dict[str, Any]) -> None:
    assert read_embeddings_usage({"prompt_tokens": 7, "total_tokens": 7, **completion}) == Usage(7, 0)


def test_output_that_is_only_in_the_total_is_read() -> None:
    assert read_usage({"prompt_tokens": 7, "total_tokens": 12}) == Usage(7, 5)


@pytest.mark.parametrize("total", [{}, {"total_tokens": 7}, {"total_tokens": 3}, {"total_tokens": "12"}])
def test_a_usage_without_output_is_none(total: dict[str, Any]) -> None:
    assert read_usage({"prompt_tokens": 7, **total}) is None


@pytest.mark.parametrize("bad", [-1, -1.0, True, False, 7.5, "7", [7], {"tokens": 7}, 1e400])
@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_is_none_is_no_usage(field: str, bad: object) -> None:
    assert read_usage({"prompt_tokens": 7, "completion_tokens": 5, field: bad}) is None


@pytest.mark.parametrize("usage", [None, 5, "usage", [], {}, {"completion_tokens": 5}, {"prompt_tokens": None}])
def test_what_has_no_counts_is_no_usage(usage: object) -> None:
    assert read_usage(usage) is None


@pytest.mark.parametrize("details", [None, 5, [], {}, {"cached_tokens": None}, {"cached_tokens": -3}])
def test_a_cache_that_makes_no_sense_is_none(details: object) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": details}
    assert read_usage(usage) == Usage(7, 5, 0)


@pytest.mark.parametrize("cached", [8, 10**18])
def test_no_more_is_cached_than_was_sent(cached: int) -> None:
    assert billed(Usage(7, 5, cached, cached), ASK, BOUND) == used(input_tokens=7, output=5, cache_read=7)


def test_absurd_counts_are_billed_as_the_bound() -> None:
    assert billed(Usage(10**18, 10**18, 10**18), ASK, BOUND) == used(input_tokens=100, output=20, cache_read=100)


def test_an_echoed_prompt_is_output_too() -> None:
    bound = Bound(input_tokens=100, answers=2, output_tokens_each=10, echo=True)
    assert billed(Usage(100, 10**18), ASK, bound) == used(input_tokens=100, output=220)


def test_of_two_reports_the_prompt_counts_once() -> None:
    assert Usage(7, 5, 3).plus(Usage(6, 4, 2), same_prompt=True) == Usage(7, 9, 3)
    assert Usage(7, 5, 3).plus(Usage(6, 4, 2), same_prompt=False) == Usage(13, 9, 3)


def test_several_prompts_are_charged_what_they_cannot_be_less_than() -> None:
    ask = Ask("text_completion", "m", input_bytes=41, prompts=2, least_input_tokens=30)
    assert billed(Usage(7, 5), ask, BOUND) == used(input_tokens=30, output=5)
    assert billed(Usage(70, 5), ask, BOUND) == used(input_tokens=70, output=5)


@pytest.mark.parametrize(
    ("usage", "beyond"), [(Usage(100, 20), False), (Usage(101, 20), True), (Usage(100, 21), True), (Usage(0, 0), False)]
)
def test_more_than_the_bound_is_noticed(usage: Usage, beyond: bool) -> None:
    assert exceeds(usage, BOUND) == beyond


@given(_JSON | _USAGES, st.sampled_from(OPERATIONS), _BOUNDS, st.integers(0, 10**9), st.integers(0, 10**9))
def test_no_usage_is_billed_beyond_the_bound(
    document: object, operation: Operation, bound: Bound, least_input: int, least_output: int
) -> None:
    usage = read_embeddings_usage(document) if operation == "embeddings" else read_usage(document)
    if usage is not None:
        assert min(asdict(usage).values()) >= 0
        ask = Ask(operation, "m", 41, least_input_tokens=least_input)
        assert within(billed(usage, ask, bound, least_output), bound)


# --- no usage -------------------------------------------------------------------------------------------------------


def test_without_a_usage_four_bytes_of_input_are_a_token() -> None:
    assert billed_without_usage(ASK, BOUND, 5) == used(input_tokens=11, output=5)


def test_without_a_usage_an_input_that_is_not_text_counts_as_its_bound() -> None:
    assert billed_without_usage(Ask("chat", "m", input_bytes=None), BOUND, 5) == used(input_tokens=100, output=5)


@given(_BOUNDS, st.none() | st.integers(0, 10**9), st.integers(0, 10**12))
def test_no_estimate_is_beyond_the_bound(bound: Bound, input_bytes: int | None, output: int) -> None:
    assert within(billed_without_usage(Ask("chat", "m", input_bytes), bound, output), bound)


# --- answers --------------------------------------------------------------------------------------------------------


def answer(*choices: Any, **members: Any) -> Answer:
    read = read_answer(json.dumps({"choices": list(choices), **members}).encode(), "chat")
    assert read is not None
    return read


def charged(*choices: Any, **members: Any) -> Metered:
    return answer(*choices, **members).metered(ASK, BOUND)


def chat(**message: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}


def test_an_answer_is_charged_by_its_usage() -> None:
    assert charged(chat(content="12345"), usage={"prompt_tokens": 7, "completion_tokens": 5}) == used(7, 5)


def test_without_a_usage_four_bytes_of_text_are_a_token() -> None:
    assert charged(chat(content="12345")) == used(11, 2)
    assert charged(chat(content="üüüü")) == used(11, 2)
    assert charged(chat(content="1234"), chat(content="1234")) == used(11, 2)
    assert charged({"index": 0, "text": "1234"}) == used(11, 1)


def test_of_several_answers_eight_characters_are_a_token_at_least() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    choices = [chat(content="x" * 32), chat(content="x" * 32)]
    assert charged(*choices, usage=usage) == used(7, 8)
    assert answer(*choices, usage=usage).metered(ASK, Bound(100, 1, 10)) == used(7, 1)


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 7, "completion_tokens": 0}])
@pytest.mark.parametrize(
    "choices",
    [[], [chat()], [chat(content="")], [chat(content=None, refusal=None, tool_calls=[])], [{"text": ""}], [None, 5]],
)
def test_an_answer_with_nothing_in_it_costs_nothing(choices: list[Any], usage: dict[str, int] | None) -> None:
    assert answer(*choices, usage=usage).empty
    assert charged(*choices, usage=usage) == Metered()


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a"},
        {"content": None, "refusal": "no"},
        {"content": None, "tool_calls": [{"id": "t", "function": {"name": "f", "arguments": "{}"}}]},
        {"content": "", "reasoning_content": "hm"},
    ],
)
def test_anything_that_was_said_is_not_empty(message: dict[str, Any]) -> None:
    assert not answer(chat(**message)).empty
    assert charged(chat(**message)).output > 0


def test_reasoning_that_is_not_shown_is_paid() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9}}
    assert charged(chat(content=""), usage=usage) == used(7, 9, reasoning=9)


def test_reasoning_under_both_of_its_names_counts_once() -> None:
    # vLLM repeats it under its old name.
    once = charged(chat(content="1234", reasoning="12345678"))
    twice = charged(chat(content="1234", reasoning="12345678", reasoning_content="12345678"))
    assert once == twice == used(11, 3)


@pytest.mark.parametrize("embedding", [[0.1, 0.2], "AAAA"])
def test_an_embedding_is_charged_by_its_input(embedding: object) -> None:
    body = {"object": "list", "data": [{"embedding": embedding}], "usage": {"prompt_tokens": 7, "total_tokens": 7}}
    read = read_answer(json.dumps(body).encode(), "embeddings")
    assert read is not None
    assert read.metered(Ask("embeddings", "m", 41, completions=0), Bound(100, 0, 0)) == used(7, 0)


@pytest.mark.parametrize(
    ("shown", "paid"),
    [({"embeddings": [[0.1]]}, True), ({"data": {"0": [0.1]}}, True), ({"data": [{"values": [0.1]}]}, True),
     ({"data": [{"index": 1, "object": "embedding", "embedding": []}]}, False), ({"data": []}, False), ({}, False)],
    ids=str,
)  # fmt: skip
def test_vectors_are_paid_in_whatever_shape_they_come(shown: dict[str, Any], paid: bool) -> None:
    body = {"object": "list", "model": "m", **shown, "usage": {"prompt_tokens": 7, "total_tokens": 7}}
    read = read_answer(json.dumps(body).encode(), "embeddings")
    assert read is not None
    metered = read.metered(Ask("embeddings", "m", 41, completions=0), Bound(100, 0, 0))
    assert metered == (used(7, 0) if paid else Metered())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b'"text"', b"{", b"<html>", b'{"a": "\xff"}', b"{} {}"])
def test_what_is_no_json_object_is_no_answer(body: bytes, operation: Operation) -> None:
    assert read_answer(body, operation) is None


def test_an_error_with_status_200_is_no_answer() -> None:
    assert read_answer(b'{"choices": [{"text": "a"}], "error": {"message": "broke"}}', "chat") is None
    assert read_answer(b'{"choices": [{"text": "a"}], "error": null}', "chat") is not None


def test_an_answer_nested_deeper_than_can_be_written_is_read() -> None:
    nested = "[" * 300 + "]" * 300
    body = b'{"choices": [{"message": {"content": "a", "tool_calls": %b}}]}' % nested.encode()
    read = read_answer(body, "chat")
    assert read is not None
    assert not read.empty


@given(_ANSWERS, st.sampled_from(OPERATIONS), _BOUNDS)
def test_no_answer_is_charged_beyond_the_bound(document: object, operation: Operation, bound: Bound) -> None:
    read = read_answer(json.dumps(document).encode(), operation)
    assert read is None or within(read.metered(Ask(operation, "m", 41), bound), bound)


@given(st.binary(max_size=100), st.sampled_from(OPERATIONS))
def test_no_bytes_are_too_strange(body: bytes, operation: Operation) -> None:
    read_answer(body, operation)
