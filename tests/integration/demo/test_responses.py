"""/responses of the demo model, asked by the real OpenAI client."""

import json
from typing import Any

import openai
import pytest

from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL

QUESTION: list[Any] = [
    {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
    {"role": "user", "content": "How deep is the Mariana trench?"},
]
TOOL: Any = {
    "type": "function",
    "name": "look_up",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": True,
}


async def test_a_response_says_what_it_is_and_what_was_asked(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model=MODEL, input=QUESTION, instructions="In metres.")
    assert response.status == "completed" and response.incomplete_details is None
    assert "demo model of the quota gateway" in response.output_text
    assert "How deep is the Mariana trench?" in response.output_text
    assert response.usage is not None
    asked = "In metres.", "Be brief.", QUESTION[1]["content"]
    assert response.usage.input_tokens == sum(len(split_tokens(text)) for text in asked)
    assert response.usage.output_tokens == len(split_tokens(response.output_text))
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    counted = await client.responses.input_tokens.count(model=MODEL, input=QUESTION, instructions="In metres.")
    assert counted.input_tokens == response.usage.input_tokens


async def test_a_stream_is_the_same_response_in_numbered_events(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model=MODEL, input=QUESTION)
    async with client.responses.stream(model=MODEL, input=QUESTION) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == whole.output_text and final.usage == whole.usage
    assert whole.usage is not None and deltas == whole.usage.output_tokens


async def test_a_limit_leaves_the_response_incomplete(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=16)
    stream = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=16, stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None and response.usage.output_tokens == 16


async def test_a_tool_is_called_and_its_output_is_read(client: openai.AsyncOpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "Use the tool."}]
    async with client.responses.stream(model=MODEL, input=asked, tools=[TOOL]) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.function_call_arguments.delta"]
        [call] = (await stream.get_final_response()).output
    assert call.type == "function_call" and call.name == "look_up"
    assert "".join(deltas) == call.arguments
    assert json.loads(call.arguments) == {"place": "demo"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "10,935 m"}
    answer = await client.responses.create(model=MODEL, input=[*asked, call.to_dict(), result], tools=[TOOL])
    assert "demo model" in answer.output_text
    forbidden = await client.responses.create(model=MODEL, input=asked, tools=[TOOL], tool_choice="none")
    assert "demo model" in forbidden.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(
    client: openai.AsyncOpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=MODEL, input="Hello", extra_body=fields)
    assert refused.value.param == param
