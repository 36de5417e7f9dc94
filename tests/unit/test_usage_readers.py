"""Reports of usage, room by room: which figures count where several are told, and how far a report is believed."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.apis.registry import APIS
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.usage import (
    Usage,
    billed,
    read_embeddings_usage,
    read_message_usage,
    read_ranks,
    read_response_usage,
    read_usage,
)

Reader = Callable[[object], Usage | None]


def read_ranks_usage(usage: object) -> Usage | None:
    """What a whole answer of a reranker says, in either of its places."""
    read = read_ranks(json.dumps({"results": [1], "usage": usage}).encode())
    in_meta = read_ranks(json.dumps({"results": [1], "meta": {"billed_units": usage}}).encode())
    return read and in_meta and (read.usage or in_meta.usage)


READERS: dict[str, Reader] = {
    "choices": read_usage,
    "embeddings": read_embeddings_usage,
    "messages": read_message_usage,
    "ranks": read_ranks_usage,
    "responses": read_response_usage,
}
BOUND = Bound(input_tokens=100, answers=2, output_tokens_each=10)
ASK = Ask("chat", "m", input_bytes=41)

_NAMES = (
    "prompt_tokens completion_tokens total_tokens input_tokens output_tokens cache_read_input_tokens "
    "cache_creation_input_tokens search_units".split()
)
_DETAILS = "cached_tokens cache_write_tokens audio_tokens image_tokens reasoning_tokens thinking_tokens".split()
_GROUPS = [f"{side}_tokens_details" for side in ("prompt", "completion", "input", "output")]
_FIGURE = st.one_of(
    st.integers(0, 200),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 1e30, 7.0, -0.0, True, None, "7", [], {}]),
    st.floats(allow_nan=False, allow_infinity=False),
)
_JSON = st.recursive(
    _FIGURE | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES + _GROUPS), inner, max_size=3),
    max_leaves=8,
)
_GROUP = st.fixed_dictionaries({}, optional=dict.fromkeys(_DETAILS, _FIGURE))
_USAGES = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(_NAMES, _FIGURE | _JSON), **dict.fromkeys(_GROUPS, _GROUP | _JSON)}
)
_BOUNDS = st.builds(Bound, st.integers(0, 10**7), st.integers(0, 300), st.integers(0, 10**7), st.booleans())


@pytest.mark.parametrize("reader", READERS)
@given(usage=_JSON | _USAGES, bound=_BOUNDS, least_input=st.integers(0, 10**9), least_output=st.integers(0, 10**9))
@example(usage=dict.fromkeys(_NAMES, 10**30), bound=BOUND, least_input=0, least_output=0)
def test_whatever_is_reported_no_more_than_the_bound_is_charged_and_no_part_twice(
    reader: str, usage: object, bound: Bound, least_input: int, least_output: int
) -> None:
    read = READERS[reader](usage)
    if read is None:
        return
    assert min(asdict(read).values()) >= 0
    metered = billed(read, replace(ASK, least_input_tokens=least_input), bound, least_output)
    most = bound.metered(bound.output_tokens_each)
    assert min(metered.figures().values(), default=0) >= 0
    assert metered.input <= most.input and metered.output <= most.output
    assert metered.plain_input >= 0 and metered.plain_output >= 0
    assert len(str(read)) < 1000  # it is logged where it is too much


_SAID = _JSON | st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        "type message text embedding logprobs stop_reason content arguments input summary encrypted_content".split(),
        _JSON,
    ),
)
_ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("choices", "data", "results", "content", "output"), _JSON | st.lists(_SAID, max_size=3)),
        "type": st.sampled_from(["message", "error", 5]),
        "status": st.sampled_from(["completed", "incomplete", "failed", None, []]),
        "usage": _JSON | _USAGES,
        "meta": _JSON | st.fixed_dictionaries({"billed_units": _USAGES}),
        "error": _JSON,
    },
)


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/completions", "/embeddings", "/messages", "/rerank", "/responses"]
)
@given(answer=_JSON | _ANSWERS, bound=_BOUNDS)
def test_no_answer_is_charged_beyond_the_bound(path: str, answer: object, bound: Bound) -> None:
    read = APIS[path].read_answer(json.dumps(answer).encode())
    if read is not None:
        metered, most = read.metered(ASK, bound), bound.metered(bound.output_tokens_each)
        assert min(metered.figures().values(), default=0) >= 0
        assert metered.input <= most.input and metered.output <= most.output
        assert metered.plain_input >= 0 and metered.plain_output >= 0
        assert metered.requests <= most.requests


def given_and_made(reader: str, count: object) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens") if reader == "choices" else ("input_tokens", "output_tokens")
    return dict.fromkeys(names if reader in ("choices", "messages", "responses") else ("prompt_tokens", *names), count)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", [-1, -1.0, 7.5, True, "7", "", [7], {"tokens": 7}, float("inf"), None])
def test_what_is_no_count_is_no_usage(reader: str, bad: object) -> None:
    assert READERS[reader](given_and_made(reader, bad)) is None


@pytest.mark.parametrize("reader", READERS)
def test_a_whole_number_is_one_however_it_is_written(reader: str) -> None:
    """Some servers write 7.0; the JSON library makes a float of what is too large."""
    whole = READERS[reader](given_and_made(reader, 7))
    assert whole is not None and whole.input_tokens == 7
    assert READERS[reader](given_and_made(reader, 7.0)) == whole
    for huge in (10**30, 1e30, 10**300):
        read = READERS[reader](given_and_made(reader, huge))
        assert read is not None
        metered = billed(read, ASK, BOUND)
        assert (metered.input, metered.output) == (100, 20 if read.output_tokens else 0)


def test_a_count_is_small_enough_to_be_written_down() -> None:
    """Python refuses to write numbers of more than 4300 digits."""
    assert str(read_usage({"prompt_tokens": 10**5000, "completion_tokens": 10**5000}))


@pytest.mark.parametrize("reader", READERS)
def test_a_report_of_nothing_at_all_is_none(reader: str) -> None:
    assert READERS[reader](given_and_made(reader, 0)) is None


# --- where figures disagree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        ({"completion_tokens": 5, "total_tokens": 12}, Usage(7, 5)),
        ({"prompt_tokens": None, "completion_tokens": 5, "total_tokens": 12}, Usage(7, 5)),
        ({"prompt_tokens": 7, "total_tokens": 12}, Usage(7, 5)),
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 99}, Usage(7, 5)),
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 0}, Usage(7, 5)),
        ({"prompt_tokens": -7, "completion_tokens": 5, "total_tokens": 12}, None),
        ({"completion_tokens": 5, "total_tokens": 5}, None),
        ({"total_tokens": 12}, None),
    ],
)
def test_a_count_that_is_left_out_is_what_the_other_leaves_of_the_total(said: Any, usage: Usage | None) -> None:
    assert read_usage(said) == usage


@pytest.mark.parametrize(("total", "made"), [(316, 309), (16, 9), (315, 9), (317, 9), (None, 9)])
def test_reasoning_beside_the_completion_is_output_where_the_total_says_so(total: int | None, made: int) -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 300}}
    said = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": total, **details}
    assert read_usage(said) == Usage(7, made, reasoning_tokens=300)


@pytest.mark.parametrize("usage", [{"total_tokens": 7}, {"prompt_tokens": 7, "total_tokens": 99}, {"prompt_tokens": 7}])
def test_what_is_embedded_is_the_total_where_no_more_is_told(usage: dict[str, int]) -> None:
    assert read_embeddings_usage(usage) == Usage(7, 0)
    assert read_ranks_usage(usage) == Usage(7, 0)


@pytest.mark.parametrize(
    ("reader", "given", "made"),
    [("choices", "prompt", "completion"), ("responses", "input", "output")],
)
def test_audio_and_images_are_parts_of_input_and_output(reader: str, given: str, made: str) -> None:
    details = {"audio_tokens": 2, "image_tokens": 3}
    said = {
        f"{given}_tokens": 9,
        f"{made}_tokens": 8,
        f"{given}_tokens_details": details | {"cached_tokens": 1},
        f"{made}_tokens_details": details | {"reasoning_tokens": 1},
    }
    read = READERS[reader](said)
    assert read is not None
    kinds = {"audio_input": 2, "image_input": 3, "audio_output": 2, "image_output": 3}
    assert billed(read, ASK, BOUND) == Metered(9, 8, cache_read=1, reasoning=1, **kinds, requests=1)


def test_of_two_answers_the_images_of_the_prompt_count_once() -> None:
    one = Usage(9, 4, image_input_tokens=3, image_output_tokens=2)
    assert one.plus(one, same_prompt=True) == Usage(9, 8, image_input_tokens=3, image_output_tokens=4)
