"""/messages of the demo model, asked by the real Anthropic client."""

from typing import Any

import anthropic
import pytest

from gateway.demo.fields import MAX_BODY_BYTES
from gateway.demo.upstream import DemoUpstream
from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL

QUESTION = "How deep is the Mariana trench?"
TOOL: Any = {
    "name": "look_up",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


def asked(text: str = QUESTION) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": text}]}


async def test_a_message_says_what_it_is_and_what_was_asked(claude: anthropic.AsyncAnthropic) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    message = await claude.messages.create(**asked(), system=system)
    [block] = message.content
    assert block.type == "text" and message.stop_reason == "end_turn"
    assert "demo model of the quota gateway" in block.text and QUESTION in block.text
    usage = message.usage
    assert usage.input_tokens == len(split_tokens("Be brief.")) + len(split_tokens(QUESTION))
    assert usage.output_tokens == len(split_tokens(block.text))
    assert (usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (0, 0)
    counted = await claude.messages.count_tokens(model=MODEL, messages=asked()["messages"], system=system)
    assert counted.input_tokens == usage.input_tokens


async def test_a_stream_is_the_same_message(claude: anthropic.AsyncAnthropic) -> None:
    whole = await claude.messages.create(**asked())
    async with claude.messages.with_streaming_response.create(**asked(), stream=True) as raw:
        lines = [line async for line in raw.iter_lines()]
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    deltas = kinds.count("content_block_delta")
    assert deltas == whole.usage.output_tokens
    assert kinds == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    async with claude.messages.stream(**asked()) as stream:
        final = await stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage) == ("end_turn", whole.usage)


async def test_a_limit_and_a_stop_text_end_it(claude: anthropic.AsyncAnthropic) -> None:
    cut = await claude.messages.create(**(asked() | {"max_tokens": 4}))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 4)
    stopped = await claude.messages.create(**asked(), stop_sequences=["quota", " demo"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " demo")
    assert stopped.content[0].text == "This is the"


async def test_a_tool_is_used_and_its_result_is_read(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(**asked("Use the tool."), tools=[TOOL]) as stream:
        final = await stream.get_final_message()
    [block] = final.content
    assert block.type == "tool_use" and final.stop_reason == "tool_use"
    assert (block.name, block.input) == ("look_up", {"place": "demo"})
    whole = await claude.messages.create(**asked("Use the tool."), tools=[TOOL])
    assert whole.content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "10,935 m"}
    turns: list[Any] = [
        *asked("Use the tool.")["messages"],
        {"role": "assistant", "content": [block.to_dict()]},
        {"role": "user", "content": [result]},
    ]
    answer = await claude.messages.create(model=MODEL, max_tokens=1000, messages=turns, tools=[TOOL])
    assert "demo model" in answer.content[0].text
    forbidden = await claude.messages.create(**asked("Use the tool."), tools=[TOOL], tool_choice={"type": "none"})
    assert forbidden.stop_reason == "end_turn"


async def test_either_header_may_bring_a_key(upstream: DemoUpstream) -> None:
    base_url = upstream.base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base_url, auth_token="none", max_retries=0) as bearer:
        assert (await bearer.messages.create(**asked())).stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "only text parts"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no tools of its own"),
    ],
)
async def test_what_it_cannot_do_is_refused_in_anthropics_shape(
    claude: anthropic.AsyncAnthropic, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        await claude.messages.create(**asked(), extra_body=fields)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    assert said in refused.value.body["error"]["message"]


async def test_an_unknown_model_and_a_body_beyond_the_limit(claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await claude.messages.create(**(asked() | {"model": "claude-9"}))
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.APIStatusError) as large:
        await claude.messages.create(**asked("x" * MAX_BODY_BYTES))
    assert large.value.body["error"]["type"] == "request_too_large"
