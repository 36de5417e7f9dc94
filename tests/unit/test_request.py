"""What a request may ask for, and the most that it can use."""

import json
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.registry import APIS
from gateway.apis.text import MAX_COMPLETIONS, MAX_PROMPTS
from gateway.domain.model import Model
from gateway.domain.price import FEMTO_PER_NANO, Prices, TokenPrices, cost_of
from gateway.domain.request import (
    Ask,
    Bound,
    InvalidRequest,
    Operation,
    affordable_output,
    bound_of,
    estimated_input,
    least_output,
    worst_femto,
)
from tests.unit.figures import used

MODEL = Model("m", "up", Prices(TokenPrices(30_500_000, 777_700_000)), context_window=4096, max_output_tokens=1000)
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": HELLO}
TEXT = {"model": "m", "prompt": "Hello"}
EMBED = {"model": "m", "input": "Hello"}
BODIES: dict[Operation, dict[str, Any]] = {"chat": CHAT, "text_completion": TEXT, "embeddings": EMBED}
OPERATIONS: list[Operation] = ["chat", "text_completion", "embeddings"]


def read_request(operation: Operation, body: object, size_bytes: int, allowed: Collection[str] = ()) -> Ask:
    api = next(api for api in APIS.values() if api.name == operation)
    return api.read(body, allowed).of_size(size_bytes)


def read(operation: Operation, **fields: Any) -> Ask:
    body = {**BODIES[operation], **fields}
    return read_request(operation, body, len(json.dumps(body)))


def bound(operation: Operation, **fields: Any) -> Bound:
    return bound_of(read(operation, **fields), MODEL)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("body", [None, 5, "text", [], [CHAT], True])
def test_a_body_that_is_no_object_is_refused(operation: Operation, body: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_request(operation, body, 10)
    assert refused.value.param is None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("model", [None, "", 5, ["m"], {"name": "m"}, True])
def test_a_model_is_a_name(operation: Operation, model: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(operation, model=model)
    assert refused.value.param == "model"


_NOT_WHOLE = [True, False, 1.0, 1.5, "1", [1], {"n": 1}, 0, -1, 10**9 + 1, 1e30]


@pytest.mark.parametrize("value", _NOT_WHOLE)
@pytest.mark.parametrize(
    ("operation", "field"),
    [
        ("chat", "max_tokens"),
        ("chat", "max_completion_tokens"),
        ("chat", "n"),
        ("text_completion", "max_tokens"),
        ("text_completion", "n"),
        ("text_completion", "best_of"),
    ],
)
def test_a_count_is_a_positive_whole_number(operation: Operation, field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(operation, **{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("operation", "fields", "param"),
    [
        ("chat", {"n": MAX_COMPLETIONS + 1}, "n"),
        ("text_completion", {"best_of": MAX_COMPLETIONS + 1}, "best_of"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "Hello"}, "messages"),
        ("chat", {"messages": {"role": "user"}}, "messages"),
        ("chat", {"messages": [*HELLO, "Hello"]}, "messages[1]"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, 5]}, "messages[1]"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
        ("chat", {"tools": {"type": "function"}}, "tools"),
        ("chat", {"tools": ["function"]}, "tools[0].type"),
        ("chat", {"tools": [{"type": "function"}, {"type": "web_search"}]}, "tools[1].type"),
        ("chat", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat", {"modalities": "audio"}, "modalities"),
        ("chat", {"service_tier": "priority"}, "service_tier"),
        ("chat", {"service_tier": ["flex"]}, "service_tier"),
        ("chat", {"stream": "true"}, "stream"),
        ("chat", {"stream": 1}, "stream"),
        ("chat", {"stream": True, "stream_options": []}, "stream_options"),
        ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ("chat", {"chat_template_kwargs": []}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": {"chat_template": "x" * 9}}, "chat_template_kwargs.chat_template"),
        ("chat", {"chat_template_kwargs": {"enable_thinking": {}}}, "chat_template_kwargs.enable_thinking"),
        ("chat", {"n_predict": 5}, "n_predict"),
        ("chat", {"web_search_options": {}}, "web_search_options"),
        ("chat", {"max_output_tokens": 5}, "max_output_tokens"),
        ("chat", {"prompt": "Hello"}, "prompt"),
        ("chat", {"best_of": 2}, "best_of"),
        ("chat", {"Max_Tokens": 5}, "Max_Tokens"),
        ("chat", {"use_beam_search": True}, "use_beam_search"),
        ("text_completion", {"prompt": None}, "prompt"),
        ("text_completion", {"prompt": []}, "prompt"),
        ("text_completion", {"prompt": 5}, "prompt"),
        ("text_completion", {"prompt": {"text": "Hello"}}, "prompt"),
        ("text_completion", {"prompt": ["a", 5]}, "prompt[1]"),
        ("text_completion", {"prompt": [[1], [True]]}, "prompt[1]"),
        ("text_completion", {"prompt": [1.5, 2]}, "prompt[0]"),
        ("text_completion", {"prompt": [True, True]}, "prompt[0]"),
        ("text_completion", {"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ("text_completion", {"echo": "yes"}, "echo"),
        ("text_completion", {"max_completion_tokens": 5}, "max_completion_tokens"),
        ("text_completion", {"messages": HELLO}, "messages"),
        ("embeddings", {"input": None}, "input"),
        ("embeddings", {"input": [None]}, "input[0]"),
        ("embeddings", {"input": [[1], {"text": "a"}]}, "input[1]"),
        ("embeddings", {"n": 2}, "n"),
    ],
)
def test_a_field_that_cannot_be_priced_is_refused_by_name(
    operation: Operation, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(operation, **fields)
    assert refused.value.param == param


def test_an_unknown_field_is_named_but_not_at_length() -> None:
    with pytest.raises(InvalidRequest) as refused:
        read("chat", **{"x" * 10_000: 1})
    assert refused.value.param == "x" * 64
    assert len(str(refused.value)) < 200


def test_unknown_fields_may_be_null_or_allowed_by_the_configuration() -> None:
    assert read("chat", n_predict=None).model == "m"
    body = {**CHAT, "top_secret": 1}
    assert read_request("chat", body, 10, allowed={"top_secret"}).model == "m"
    with pytest.raises(InvalidRequest):
        read_request("chat", body, 10, allowed={"other"})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_null_means_that_a_field_is_not_there(operation: Operation) -> None:
    nothing = dict.fromkeys(("max_tokens", "n", "stream", "stream_options", "user", "best_of", "echo", "tools"))
    assert read(operation, **nothing).completions == read(operation).completions
    assert read(operation, **nothing).max_tokens == read(operation).max_tokens


# --- what is read ---------------------------------------------------------------------------------------------------


def test_the_smaller_of_both_limits_counts() -> None:
    for fields in ({"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 7}):
        assert read("chat", **fields).max_tokens == 7
    assert read("chat", max_completion_tokens=9).max_tokens == 9
    assert read("chat").max_tokens is None


def test_a_text_completion_has_the_limit_of_its_api() -> None:
    assert read("text_completion").max_tokens == 16
    assert read("text_completion", max_tokens=99).max_tokens == 99


@pytest.mark.parametrize(
    ("fields", "stream", "wants_usage"),
    [
        ({}, False, False),
        ({"stream": False, "stream_options": None}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
    ],
)
def test_the_wish_for_usage_is_read(fields: dict[str, Any], stream: bool, wants_usage: bool) -> None:
    for operation in ("chat", "text_completion"):
        ask = read(operation, **fields)
        assert (ask.stream, ask.wants_usage) == (stream, wants_usage)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "t", "type": "function"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        # As the SDKs send an answer back that some servers gave them.
        {"role": "assistant", "content": "a", "audio": None, "annotations": None, "function_call": None},
        {"role": "tool", "tool_call_id": "t", "content": "a"},
    ],
)
def test_text_is_bounded_by_its_bytes(message: dict[str, Any]) -> None:
    assert read("chat", messages=[*HELLO, message]).input_bytes is not None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]},
        {"role": "user", "content": [{"image_url": {"url": "https://example.com/a.png"}}]},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": "a", "images": ["aGk="]},
        {"role": "user", "content": [{"type": "text", "text": "a", "image_url": "https://example.com/a.png"}]},
        {"role": "assistant", "content": None, "audio": {"id": "audio_1"}},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "audio": {"id": "audio_1"}},
    ],
)
def test_what_is_not_text_makes_the_bound_the_context_window(message: dict[str, Any]) -> None:
    ask = read("chat", messages=[*HELLO, message])
    assert ask.input_bytes is None
    assert bound_of(ask, MODEL).input_tokens == MODEL.context_window
    assert estimated_input(ask, bound_of(ask, MODEL)) == MODEL.context_window


# --- the bound ------------------------------------------------------------------------------------------------------


def test_the_bound_of_a_small_chat() -> None:
    size = len(json.dumps({**CHAT, "max_tokens": 50}))
    assert bound("chat", max_tokens=50) == Bound(size + MODEL.template_tokens, 1, 50)


@pytest.mark.parametrize(
    ("operation", "fields", "answers"),
    [
        ("chat", {}, 1),
        ("chat", {"n": 3}, 3),
        ("text_completion", {}, 1),
        ("text_completion", {"n": 3}, 3),
        ("text_completion", {"best_of": 4}, 4),
        ("text_completion", {"n": 3, "best_of": 4}, 4),
        ("text_completion", {"n": 4, "best_of": 3}, 4),
        ("text_completion", {"prompt": ["a", "b", "c"]}, 3),
        ("text_completion", {"prompt": ["a", "b", "c"], "n": 2}, 6),
        ("text_completion", {"prompt": [1, 2, 3]}, 1),
        ("text_completion", {"prompt": [[1, 2, 3], [4]]}, 2),
        ("text_completion", {"prompt": ["a", [4]], "best_of": 5}, 10),
        ("embeddings", {"input": ["a", "b"]}, 0),
        ("embeddings", {"input": [1, 2]}, 0),
    ],
)
def test_every_answer_is_in_the_bound(operation: Operation, fields: dict[str, Any], answers: int) -> None:
    most = bound(operation, **fields)
    assert most.answers == answers
    assert most.metered(10).output == 10 * answers


def test_each_prompt_has_its_own_template_and_context_window() -> None:
    prompts = ["a", "b", "c"]
    size = len(json.dumps({**TEXT, "prompt": prompts}))
    assert bound("text_completion", prompt=prompts).input_tokens == size + 3 * MODEL.template_tokens
    assert bound("text_completion", prompt=["a" * 20_000, "b", "c"]).input_tokens == 3 * MODEL.context_window
    assert bound("embeddings", input=["a" * 20_000, "b"]) == Bound(2 * MODEL.context_window, 0, 0)


def test_an_echo_adds_the_prompt_to_each_answer() -> None:
    most = bound("text_completion", echo=True, n=2, max_tokens=10)
    assert most.metered(10) == used(most.input_tokens, 2 * (10 + most.input_tokens))


@pytest.mark.parametrize(("asked", "bounded"), [(1, 1), (999, 999), (1000, 1000), (1001, 1000), (10**9, 1000)])
def test_no_answer_is_longer_than_the_models_longest(asked: int, bounded: int) -> None:
    assert bound("chat", max_tokens=asked).output_tokens_each == bounded


@given(st.integers(1, 50_000), st.integers(1, 20_000), st.integers(1, 20_000), st.integers(0, 1000))
def test_the_limit_that_is_put_in_fits_beside_the_prompt(
    size: int, context: int, most_output: int, template: int
) -> None:
    model = Model("m", "up", MODEL.prices, context, min(context, most_output), template)
    most = bound_of(Ask("chat", "m", size), model)
    assert 1 <= most.output_tokens_each <= model.max_output_tokens
    # A prompt that may fill the window leaves a quarter for the answer: most texts have far fewer tokens than bytes.
    prompt = min(most.input_tokens, context * 3 // 4)
    assert most.output_tokens_each <= max(1, context - prompt)


def test_an_image_leaves_a_quarter_of_the_window_for_the_answer() -> None:
    model = Model("m", "up", MODEL.prices, context_window=4096, max_output_tokens=4096)
    assert bound_of(Ask("chat", "m", input_bytes=None), model).output_tokens_each == 1024


@given(st.text(), st.integers(1, 50))
def test_the_bytes_of_a_request_bound_its_tokens(text: str, count: int) -> None:
    # No tokenizer makes more tokens of a text than one per UTF-8 byte.
    messages = [{"role": "user", "content": text}] * count
    raw = orjson.dumps({"model": "m", "messages": messages})
    most = bound_of(read_request("chat", orjson.loads(raw), len(raw)), MODEL)
    assert most.input_tokens >= min(MODEL.context_window, count * len(text.encode()) + MODEL.template_tokens)


def test_schemas_count_as_large_as_templates_write_them() -> None:
    properties = {f"p{number}": {"type": "array", "items": {"enum": list("abc")}} for number in range(5)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    model = replace(MODEL, context_window=100_000)
    with_tool, without = (bound_of(read("chat", **fields), model).input_tokens for fields in ({"tools": [tool]}, {}))
    # Llama 3's template writes them indented by four.
    assert with_tool - without >= len(json.dumps([tool], indent=4))


def test_the_forwarded_size_is_added_to_what_templates_add() -> None:
    assert read("chat").of_size(10).input_bytes == len(json.dumps(CHAT)) + 10
    assert Ask("chat", "m", input_bytes=None).of_size(10).input_bytes is None


@pytest.mark.parametrize(
    ("prompt", "least"),
    [
        ("a" * 80, 0),
        (["a" * 80, "b" * 16], 12),
        ([1, 2, 3], 3),
        ([[1, 2, 3], [4]], 4),
        (["a" * 80, [4, 5]], 12),
    ],
)
def test_several_prompts_cannot_be_less_than_their_characters_show(prompt: Any, least: int) -> None:
    assert read("text_completion", prompt=prompt).least_input_tokens == least
    assert read("embeddings", input=prompt).least_input_tokens == least


@given(st.lists(st.lists(st.integers(0, 300_000), min_size=1, max_size=30), min_size=1, max_size=5))
def test_the_bytes_of_a_request_bound_its_token_ids(prompts: list[list[int]]) -> None:
    raw = orjson.dumps({"model": "m", "prompt": prompts})
    most = bound_of(read_request("text_completion", orjson.loads(raw), len(raw)), MODEL)
    assert most.input_tokens >= sum(map(len, prompts))


@pytest.mark.parametrize("asked", [True, False, None])
def test_a_client_may_ask_for_usage_on_every_chunk(asked: bool | None) -> None:
    ask = read("chat", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": asked})
    assert (ask.stream, ask.wants_usage, ask.wants_running_usage) == (True, True, bool(asked))
    with pytest.raises(InvalidRequest) as refused:
        read("chat", stream=True, stream_options={"continuous_usage_stats": "yes"})
    assert refused.value.param == "stream_options.continuous_usage_stats"


# --- what can be paid -----------------------------------------------------------------------------------------------

_PRICED = st.builds(
    lambda prices: Model("m", "up", Prices(TokenPrices(*prices)), 4096, 1000),
    st.tuples(*[st.integers(0, 10**9)] * 2, *[st.none() | st.integers(0, 10**9)] * 2),
)
_BOUNDS = st.builds(Bound, st.integers(0, 10**5), st.integers(0, 130), st.integers(1, 1000), st.booleans())


@given(_BOUNDS, _PRICED, st.integers(0, 10**18))
def test_the_affordable_output_is_the_most_that_fits(most: Bound, model: Model, femto: int) -> None:
    output = affordable_output(most, model, femto)
    assert 0 <= output <= most.output_tokens_each
    if output:
        assert worst_femto(most, model, output) <= femto
    if output < most.output_tokens_each:
        assert worst_femto(most, model, output + 1) > femto


@given(_BOUNDS, _PRICED, st.data())
def test_no_use_within_the_bound_costs_more_than_the_worst(most: Bound, model: Model, data: st.DataObject) -> None:
    tokens = most.metered(most.output_tokens_each)
    given_tokens = data.draw(st.integers(0, tokens.input))
    spent = used(given_tokens, data.draw(st.integers(0, tokens.output)), data.draw(st.integers(0, given_tokens)))
    assert model.prices.femto(spent) <= worst_femto(most, model, most.output_tokens_each)


@given(_BOUNDS, _PRICED)
def test_a_hold_of_whole_nano_credits_still_affords_its_bound(most: Bound, model: Model) -> None:
    held_nano = cost_of(worst_femto(most, model, most.output_tokens_each), 1_000_000).payg_nano
    assert affordable_output(most, model, held_nano * FEMTO_PER_NANO) == most.output_tokens_each


@pytest.mark.parametrize(("each", "least"), [(1, 1), (16, 16), (17, 16), (1000, 16)])
def test_the_least_output_is_what_is_asked_or_sixteen(each: int, least: int) -> None:
    assert least_output(Bound(10, 1, each)) == least


def test_estimated_input_is_a_quarter_of_the_bytes_within_the_bound() -> None:
    assert estimated_input(Ask("chat", "m", 41), Bound(100, 1, 1)) == 11
    assert estimated_input(Ask("chat", "m", 4000), Bound(100, 1, 1)) == 100


# --- anything at all ------------------------------------------------------------------------------------------------

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_NAMES = (
    "model messages prompt input max_tokens max_completion_tokens n best_of echo stream stream_options tools "
    "modalities service_tier"
).split()
_MESSAGES = st.lists(
    _JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "audio"), _JSON)), max_size=3
)
_ODD_BODIES = _JSON | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(_NAMES, _JSON) | {"model": st.just("m"), "messages": _JSON | _MESSAGES}
)


@given(st.sampled_from(OPERATIONS), _ODD_BODIES)
def test_any_document_is_read_or_refused(operation: Operation, document: object) -> None:
    raw = json.dumps(document).encode()
    try:
        ask = read_request(operation, orjson.loads(raw), len(raw))
    except InvalidRequest as refused:
        assert refused.param is None or re.match(r".{1,64}", refused.param, re.DOTALL) or refused.param == ""
        return
    most = bound_of(ask, MODEL)
    assert most.input_tokens >= 0
    assert (most.output_tokens_each >= 1) == (most.answers > 0)
    assert worst_femto(most, MODEL, most.output_tokens_each) >= 0
