"""Talks with the demo model over its websocket, by the real OpenAI client."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import WSMsgType
from openai.resources.realtime.realtime import AsyncRealtimeConnection

from gateway.demo.upstream import DemoUpstream
from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL

SECOND = bytes(48_000)
QUESTION: Any = {
    "type": "message",
    "role": "user",
    "content": [{"type": "input_text", "text": "How deep is the Mariana trench?"}],
}


@pytest.fixture
async def talk(client: openai.AsyncOpenAI) -> AsyncIterator[AsyncRealtimeConnection]:
    """A connection that has been greeted."""
    async with client.realtime.connect(model=MODEL) as connection:
        assert (await connection.recv()).type == "session.created"
        yield connection


async def until(talk: AsyncRealtimeConnection, kind: str) -> list[Any]:
    """The events up to the first of a kind."""
    events: list[Any] = []
    async with asyncio.timeout(30):
        while not events or events[-1].type != kind:
            events.append(await talk.recv())
            if kind != "error":
                assert events[-1].type != "error", events[-1]
    return events


async def answered(talk: AsyncRealtimeConnection, **response: Any) -> list[Any]:
    await talk.response.create(response=response)
    return await until(talk, "response.done")


async def asked(talk: AsyncRealtimeConnection, item: Any = QUESTION) -> Any:
    """Put an item into the conversation; the item as the server has it."""
    await talk.conversation.item.create(item=item)
    added, done = await until(talk, "conversation.item.done")
    assert added.type == "conversation.item.added"
    return done.item


async def refused(talk: AsyncRealtimeConnection) -> Any:
    [event] = await until(talk, "error")
    return event.error


async def test_a_session_begins_and_can_be_changed(client: openai.AsyncOpenAI) -> None:
    async with client.realtime.connect(model=MODEL) as talk:
        created = await talk.recv()
        assert created.type == "session.created" and created.session.type == "realtime"
        assert (created.session.model, created.session.output_modalities) == (MODEL, ["audio"])
        await talk.session.update(
            session={
                "type": "realtime",
                "output_modalities": ["text"],
                "instructions": "Be brief.",
                "max_output_tokens": 9,
            }
        )
        updated = await talk.recv()
        assert updated.type == "session.updated" and updated.session.type == "realtime"
        assert updated.session.output_modalities == ["text"]
        assert (updated.session.instructions, updated.session.max_output_tokens) == ("Be brief.", 9)
        done = (await answered(talk))[-1].response
        assert done.usage.output_tokens == 9 and done.usage.input_tokens == len(split_tokens("Be brief."))


async def test_an_answer_in_text(talk: AsyncRealtimeConnection) -> None:
    item = await asked(talk)
    events = await answered(talk, output_modalities=["text"])
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "conversation.item.done",
        "response.output_item.done",
        "response.done",
    ]
    assert events[2].previous_item_id == item.id
    done = events[-1].response
    assert done.status == "completed"
    [said] = done.output[0].content
    assert said.type == "output_text" and said.text == "".join(deltas)
    assert "demo model" in said.text and "How deep is the Mariana trench?" in said.text
    usage = done.usage
    assert (usage.input_token_details.text_tokens, usage.input_token_details.audio_tokens) == (
        len(split_tokens(QUESTION["content"][0]["text"])),
        0,
    )
    assert (usage.output_token_details.text_tokens, usage.output_token_details.audio_tokens) == (len(deltas), 0)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_sound_is_answered_with_sound(talk: AsyncRealtimeConnection) -> None:
    for _ in range(2):
        await talk.input_audio_buffer.append(audio=base64.b64encode(SECOND).decode())
    await talk.input_audio_buffer.commit()
    committed, *_, item = await until(talk, "conversation.item.done")
    assert committed.type == "input_audio_buffer.committed" and committed.item_id == item.item.id
    events = await answered(talk)
    transcript = "".join(event.delta for event in events if event.type == "response.output_audio_transcript.delta")
    sound = b"".join(base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta")
    assert "2.00 seconds of sound" in transcript
    assert len(sound) == len(transcript) * 48 * 60
    assert any(sound)
    assert "response.output_audio.done" in [event.type for event in events]
    done = events[-1].response
    assert done.output[0].content[0].transcript == transcript
    usage = done.usage
    assert (usage.input_token_details.text_tokens, usage.input_token_details.audio_tokens) == (0, 20)
    assert usage.output_token_details.text_tokens == len(split_tokens(transcript))
    # A token is 50 ms, and each token of text begins a new one.
    assert usage.output_token_details.audio_tokens >= len(sound) / 48 / 50
    assert usage.output_tokens == usage.output_token_details.text_tokens + usage.output_token_details.audio_tokens


async def test_the_input_grows_with_the_conversation(talk: AsyncRealtimeConnection) -> None:
    await asked(talk)
    first = (await answered(talk))[-1].response.usage
    second = (await answered(talk))[-1].response.usage
    assert second.input_tokens == first.input_tokens + first.output_tokens
    assert second.input_token_details.audio_tokens == first.output_token_details.audio_tokens


@pytest.mark.parametrize("modality", ["text", "audio"])
async def test_a_limit_leaves_an_answer_incomplete(talk: AsyncRealtimeConnection, modality: str) -> None:
    done = (await answered(talk, output_modalities=[modality], max_output_tokens=20))[-1].response
    assert (done.status, done.status_details.reason) == ("incomplete", "max_output_tokens")
    assert 0 < done.usage.output_tokens <= 20
    assert done.output[0].status == "incomplete"


async def test_an_answer_aside_is_no_part_of_the_conversation(talk: AsyncRealtimeConnection) -> None:
    aside = await answered(
        talk, conversation="none", input=[QUESTION], output_modalities=["text"], metadata={"topic": "aside"}
    )
    assert "Mariana" in aside[-1].response.output[0].content[0].text
    assert aside[-1].response.conversation_id is None and aside[-1].response.metadata == {"topic": "aside"}
    assert "conversation.item.added" not in [event.type for event in aside]
    assert (await answered(talk, max_output_tokens=1))[-1].response.usage.input_tokens == 0


async def test_a_client_that_has_heard_enough_pays_for_what_it_heard(talk: AsyncRealtimeConnection) -> None:
    await talk.response.create(response={"output_modalities": ["text"]})
    await until(talk, "response.output_text.delta")
    await talk.response.cancel()
    events = await until(talk, "response.done")
    done = events[-1].response
    assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
    heard = 1 + sum(event.type == "response.output_text.delta" for event in events)
    assert done.usage.output_tokens == heard == len(split_tokens(done.output[0].content[0].text))
    await talk.response.cancel()
    assert (await refused(talk)).code == "response_cancel_not_active"


async def test_one_answer_at_a_time(talk: AsyncRealtimeConnection) -> None:
    await talk.response.create()
    await until(talk, "response.created")
    await talk.send({"type": "response.create", "event_id": "again"})
    error = (await until(talk, "error"))[-1].error
    assert (error.code, error.event_id) == ("conversation_already_has_active_response", "again")
    await until(talk, "response.done")


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({"type": "session.dance"}, "type"),
        ({}, "type"),
        ({"type": "session.update", "session": {"type": "transcription"}}, "session.type"),
        ({"type": "session.update", "session": {"output_modalities": ["text", "audio"]}}, "output_modalities"),
        ({"type": "session.update", "session": {"max_output_tokens": 0}}, "max_output_tokens"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}},
            "audio.input.turn_detection",
        ),
        (
            {"type": "session.update", "session": {"audio": {"output": {"format": {"type": "audio/pcmu"}}}}},
            "audio.output.format",
        ),
        ({"type": "input_audio_buffer.append", "audio": "no base64"}, "audio"),
        ({"type": "input_audio_buffer.append"}, "audio"),
        ({"type": "conversation.item.create", "item": {"type": "mcp_call"}}, "item.type"),
        (
            {
                "type": "conversation.item.create",
                "item": {"type": "message", "role": "user", "content": [{"type": "input_image"}]},
            },
            "item.content",
        ),
        ({"type": "conversation.item.create", "item": QUESTION, "previous_item_id": "other"}, "previous_item_id"),
        ({"type": "response.create", "response": {"conversation": "new"}}, "response.conversation"),
        ({"type": "response.create", "response": 5}, "response"),
    ],
)
async def test_what_it_cannot_do_is_refused_and_the_session_goes_on(
    talk: AsyncRealtimeConnection, event: Any, param: str
) -> None:
    await talk.send({**event, "event_id": "mine"})
    error = await refused(talk)
    assert (error.type, error.param, error.event_id) == ("invalid_request_error", param, "mine")
    assert (await answered(talk, max_output_tokens=1))[-1].response.status == "incomplete"


async def test_sound_that_is_cleared_or_never_came_cannot_be_committed(talk: AsyncRealtimeConnection) -> None:
    await talk.input_audio_buffer.append(audio=base64.b64encode(SECOND).decode())
    await talk.input_audio_buffer.clear()
    await until(talk, "input_audio_buffer.cleared")
    await talk.input_audio_buffer.commit()
    assert (await refused(talk)).code == "input_audio_buffer_commit_empty"


async def test_an_id_is_taken_once(talk: AsyncRealtimeConnection) -> None:
    assert (await asked(talk, {**QUESTION, "id": "mine"})).id == "mine"
    await talk.conversation.item.create(item={**QUESTION, "id": "mine"})
    assert (await refused(talk)).param == "item.id"


@pytest.mark.parametrize("sent", ["no JSON", "[]", b"binary"])
async def test_what_is_no_event_is_refused(talk: AsyncRealtimeConnection, sent: str | bytes) -> None:
    await talk.send_raw(sent)
    assert (await refused(talk)).type == "invalid_request_error"


async def test_an_unknown_model_is_refused_before_the_websocket(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(Exception, match="404"):
        async with client.realtime.connect(model="gpt-9"):
            pass


async def test_the_subprotocol_is_taken_and_a_plain_request_is_not(upstream: DemoUpstream) -> None:
    url = f"{upstream.base_url}/realtime?model={MODEL}"
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url, protocols=("realtime", "openai-insecure-api-key.none")) as socket:
            assert socket.protocol == "realtime"
        async with session.get(url) as response:
            assert response.status == 426
            assert (await response.json())["error"]["message"]


async def test_a_server_that_stops_says_goodbye() -> None:
    async with aiohttp.ClientSession() as session:
        async with DemoUpstream([MODEL]) as upstream:
            socket = await session.ws_connect(f"{upstream.base_url}/realtime?model={MODEL}")
            assert (await socket.receive_json())["type"] == "session.created"
            await socket.send_json({"type": "response.create"})
            assert (await socket.receive_json())["type"] == "response.created"
            leaving = asyncio.create_task(_end_of(socket))
        assert await leaving == 1001


async def _end_of(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    while (await socket.receive()).type is WSMsgType.TEXT:
        pass
    return socket.close_code
