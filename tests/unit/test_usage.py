"""What is charged for an answer: never less than nothing, never more than the bound, whatever the upstream says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.price import Tokens
from gateway.domain.request import Ask, Bound
from gateway.upstream.usage import Answer, Usage, billed, billed_without_usage, read_answer, read_usage

BOUND = Bound(input_tokens=100, answers=2, output_tokens_each=10)
ASK = Ask("chat", "m", input_bytes=41)

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
        "prompt_tokens_details": _JSON | st.fixed_dictionaries({}, optional={"cached_tokens": _JSON}),
        "completion_tokens_details": _JSON,
    },
)
_BOUNDS = st.builds(Bound, st.integers(0, 10**7), st.integers(0, 300), st.integers(0, 10**7), st.booleans())
_MESSAGES = st.fixed_dictionaries(
    {}, optional={name: _JSON for name in ("role", "content", "refusal", "tool_calls", "reasoning")}
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


def within(tokens: Tokens, bound: Bound) -> bool:
    most = bound.tokens(bound.output_tokens_each)
    return (
        0 <= tokens.input <= most.input
        and 0 <= tokens.output <= most.output
        and 0 <= tokens.cache_read <= tokens.input
        and tokens.cache_write == 0
    )


# --- usage ----------------------------------------------------------------------------------------------------------


def test_a_usual_usage_is_billed_as_it_is() -> None:
    usage = read_usage(
        {
            "prompt_tokens": 90,
            "completion_tokens": 20,
            "total_tokens": 110,
            "prompt_tokens_details": {"cached_tokens": 80, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 15},
        }
    )
    assert usage == Usage(90, 20, 80)
    assert billed(usage, BOUND) == Tokens(input=90, output=20, cache_read=80)


@pytest.mark.parametrize("completion", [{}, {"completion_tokens": None}, {"completion_tokens": 0}])
def test_embeddings_have_no_output(completion: dict[str, Any]) -> None:
    assert read_usage({"prompt_tokens": 7, "total_tokens": 7, **completion}) == Usage(7, 0)


@pytest.mark.parametrize("bad", [-1, True, False, 7.0, 7.5, "7", [7], {"tokens": 7}, 1e400])
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
    assert billed(Usage(7, 5, cached), BOUND) == Tokens(input=7, output=5, cache_read=7)


def test_absurd_counts_are_billed_as_the_bound() -> None:
    assert billed(Usage(10**18, 10**18, 10**18), BOUND) == Tokens(input=100, output=20, cache_read=100)


def test_an_echoed_prompt_is_output_too() -> None:
    bound = Bound(input_tokens=100, answers=2, output_tokens_each=10, echo=True)
    assert billed(Usage(100, 10**18), bound) == Tokens(input=100, output=220)


def test_of_two_reports_the_prompt_counts_once() -> None:
    assert Usage(7, 5, 3).plus_output(Usage(6, 4, 2)) == Usage(7, 9, 3)


@given(_JSON | _USAGES, _BOUNDS)
def test_no_usage_is_billed_beyond_the_bound(document: object, bound: Bound) -> None:
    usage = read_usage(document)
    if usage is not None:
        assert min(usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) >= 0
        assert within(billed(usage, bound), bound)


# --- no usage -------------------------------------------------------------------------------------------------------


def test_without_a_usage_four_bytes_of_input_are_a_token() -> None:
    assert billed_without_usage(ASK, BOUND, 5) == Tokens(input=11, output=5)


def test_without_a_usage_an_input_that_is_not_text_counts_as_its_bound() -> None:
    assert billed_without_usage(Ask("chat", "m", input_bytes=None), BOUND, 5) == Tokens(input=100, output=5)


@given(_BOUNDS, st.none() | st.integers(0, 10**9), st.integers(0, 10**12))
def test_no_estimate_is_beyond_the_bound(bound: Bound, input_bytes: int | None, output: int) -> None:
    assert within(billed_without_usage(Ask("chat", "m", input_bytes), bound, output), bound)


# --- answers --------------------------------------------------------------------------------------------------------


def answer(*choices: dict[str, Any], **members: Any) -> Answer | None:
    return read_answer(json.dumps({"choices": list(choices), **members}).encode())


def chat(**message: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}


def test_an_answer_has_its_usage_and_the_size_of_its_text() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    assert answer(chat(content="12345"), usage=usage) == Answer(Usage(7, 5), empty=False, output_tokens=2)
    assert answer({"index": 0, "text": "1234"}) == Answer(None, empty=False, output_tokens=1)


def test_all_choices_count() -> None:
    assert answer(chat(content="1234"), chat(content="1234")) == Answer(None, empty=False, output_tokens=2)


def test_characters_count_in_bytes() -> None:
    assert answer(chat(content="üüüü")) == Answer(None, empty=False, output_tokens=2)


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 7, "completion_tokens": 0}])
@pytest.mark.parametrize(
    "choices",
    [[], [chat()], [chat(content="")], [chat(content=None, refusal=None, tool_calls=[])], [{"text": ""}], [None, 5]],
)
def test_an_answer_with_nothing_in_it_is_empty(choices: list[Any], usage: dict[str, int] | None) -> None:
    read = answer(*choices, usage=usage)
    assert read is not None
    assert read.empty


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
    read = answer(chat(**message))
    assert read is not None
    assert not read.empty
    assert read.output_tokens > 0


def test_hidden_output_is_not_empty() -> None:
    read = answer(chat(content=""), usage={"prompt_tokens": 7, "completion_tokens": 500})
    assert read is not None
    assert not read.empty


def test_reasoning_under_both_of_its_names_counts_once() -> None:
    once = answer(chat(content="1234", reasoning="12345678"))
    twice = answer(chat(content="1234", reasoning="12345678", reasoning_content="12345678"))
    assert once == twice == Answer(None, empty=False, output_tokens=3)


@pytest.mark.parametrize("embedding", [[0.1, 0.2], "AAAA"])
def test_an_embedding_is_not_empty(embedding: object) -> None:
    body = {"object": "list", "data": [{"embedding": embedding}], "usage": {"prompt_tokens": 7, "total_tokens": 7}}
    read = read_answer(json.dumps(body).encode())
    assert read is not None
    assert not read.empty
    assert read.usage == Usage(7, 0)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b'"text"', b"{", b"<html>", b'{"a": "\xff"}', b"{} {}"])
def test_what_is_no_json_object_is_no_answer(body: bytes) -> None:
    assert read_answer(body) is None


def test_an_error_with_status_200_is_no_answer() -> None:
    assert answer(chat(content="a"), error={"message": "broke"}) is None
    assert answer(chat(content="a"), error=None) is not None


def test_an_answer_nested_deeper_than_can_be_written_is_read() -> None:
    nested = "[" * 300 + "]" * 300
    read = read_answer(b'{"choices": [{"message": {"content": "a", "tool_calls": %b}}]}' % nested.encode())
    assert read is not None
    assert not read.empty


@given(_ANSWERS)
def test_no_answer_is_too_strange(document: object) -> None:
    read = read_answer(json.dumps(document).encode())
    assert read is None or read.output_tokens >= 0


@given(st.binary(max_size=100))
def test_no_bytes_are_too_strange(body: bytes) -> None:
    read_answer(body)
