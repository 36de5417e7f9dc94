"""Chat, completions and embeddings of the demo model, asked by the real OpenAI client."""

import base64
import json
import math
import struct
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from gateway.demo.embeddings import DIMENSIONS
from gateway.demo.fields import MAX_BODY_BYTES
from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL, TRANSCRIBER

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How deep is the Mariana trench?"},
]


async def test_lists_its_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL, TRANSCRIBER]


async def test_an_answer_says_what_it_is_and_what_was_asked(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    text = answer.choices[0].message.content
    assert text is not None and answer.usage is not None
    assert "demo model of the quota gateway" in text
    assert "How deep is the Mariana trench?" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(split_tokens("Be brief.")) + len(split_tokens(str(QUESTION[1]["content"])))
    assert answer.usage.completion_tokens == len(split_tokens(text))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_is_the_same_answer_with_its_usage_last(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, n=2)
    stream = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = ["", ""]
    finishes: list[str | None] = [None, None]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert finishes == ["stop", "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_a_stream_that_did_not_ask_gets_no_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=3, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_cuts_the_answer(client: openai.AsyncOpenAI, limit: str) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={limit: 4})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"


async def test_a_stop_text_ends_the_answer_before_it(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, stop=["quota", " demo"])
    assert answer.choices[0].message.content == "This is the"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "count": {"type": "integer"}, "unit": {"enum": ["m", "ft"]}},
            "required": ["place", "count", "unit"],
        },
    },
}
ASKS_FOR_IT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Use the tool."}]


async def test_a_tool_is_called_when_the_user_says_so(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=ASKS_FOR_IT, tools=[TOOL])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "look_up"
    assert json.loads(call.function.arguments) == {"place": "demo", "count": 1, "unit": "m"}
    assert answer.usage is not None and answer.usage.completion_tokens == len(split_tokens(call.function.arguments))
    async with client.chat.completions.stream(model=MODEL, messages=ASKS_FOR_IT, tools=[TOOL]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    [streamed] = final.choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == ("look_up", call.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"


async def test_a_tool_is_not_called_when_the_request_forbids_it(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=ASKS_FOR_IT, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].finish_reason == "stop"


async def test_a_tool_is_not_called_again_once_it_has_answered(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model=MODEL, messages=ASKS_FOR_IT, tools=[TOOL])
    [call] = first.choices[0].message.tool_calls or []
    messages: list[Any] = [
        *ASKS_FOR_IT,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "10,935 m"},
    ]
    second = await client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert "demo model" in (second.choices[0].message.content or "")


async def test_completions_answer_every_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["first", "second one"], n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)
    stream = await client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=5, stream=True)
    texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == answer.choices[0].text


async def test_embeddings_are_unit_vectors_in_both_encodings(client: openai.AsyncOpenAI) -> None:
    packed = await client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="base64")
    plain = await client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert packed.usage.prompt_tokens == plain.usage.prompt_tokens == 2
    for left, right in zip(packed.data, plain.data, strict=True):
        unpacked = struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(str(left.embedding)))
        assert unpacked == pytest.approx(right.embedding, abs=1e-6)
        assert math.hypot(*right.embedding) == pytest.approx(1)
    assert plain.data[0].embedding != plain.data[1].embedding


@pytest.mark.parametrize(("given", "tokens"), [("a b", 2), ([5, 6, 7], 3), ([[5, 6], [7]], 3)])
async def test_embeddings_count_texts_and_token_ids(
    client: openai.AsyncOpenAI, given: str | list[int] | list[list[int]], tokens: int
) -> None:
    answer = await client.embeddings.create(model=MODEL, input=given)
    assert answer.usage.prompt_tokens == tokens
    assert len(answer.data[0].embedding) == DIMENSIONS


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_bad_input_is_refused_by_name(client: openai.AsyncOpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=fields)
    assert refused.value.param == param


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert refused.value.code == "model_not_found"


async def test_a_body_beyond_the_limit_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await client.embeddings.create(model=MODEL, input="x" * MAX_BODY_BYTES)
    assert refused.value.status_code == 413


@given(st.text())
def test_tokens_join_to_the_text_and_are_at_most_its_bytes(text: str) -> None:
    tokens = split_tokens(text)
    assert "".join(tokens) == text
    assert len(tokens) <= len(text.encode())
