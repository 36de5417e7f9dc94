"""What is read of realtime events, and what the input of a response is bounded by."""

import base64
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.realtime_answers import OutputTally, read_server_event, read_usage
from gateway.apis.realtime_audio import bytes_per_second, decoded_bytes
from gateway.apis.realtime_conversation import Conversation
from gateway.apis.realtime_events import ClientEvent, Content, NotAnEvent, read_client_event, read_document
from gateway.domain.metered import Metered
from gateway.domain.request import InvalidRequest

WINDOW, TEMPLATE = 4096, 256
SECOND = base64.b64encode(bytes(48_000)).decode()


def read(event: dict[str, Any]) -> ClientEvent:
    return read_client_event(read_document(json.dumps(event)), "model")


def item_of(item: dict[str, Any]) -> Content:
    return read({"type": "conversation.item.create", "item": item}).content


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": list(parts)}


# --- the client's events ---------------------------------------------------------------------------------------------


def test_text_is_bounded_by_its_bytes() -> None:
    item = user({"type": "input_text", "text": "grüße"})
    assert item_of(item) == Content(len(orjson.dumps(item)))


def test_audio_in_an_item_counts_by_its_length_and_not_by_its_bytes() -> None:
    item = user({"type": "input_audio", "audio": SECOND, "transcript": "hello"})
    assert item_of(item) == Content(len(orjson.dumps(item)) - len(SECOND), 48_000)


@pytest.mark.parametrize(
    "item",
    [
        user({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}),
        user({"type": "input_text", "text": "x", "file_id": "file_1"}),
        user({"type": "input_audio", "audio": None}),
        {"type": "item_reference", "id": "item_1"},
        {"type": "message", "role": "user", "content": [], "prompt": "p"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
        {"type": ["message"], "role": "user"},
        {},
    ],
)
def test_what_may_stand_for_anything_is_bounded_by_the_window_alone(item: dict[str, Any]) -> None:
    assert item_of(item).anything


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"input_audio_transcription": {"language": "en"}}, "session.audio.input.transcription"),
        (
            {"input_audio_transcription": None, "audio": {"input": {"transcription": {"model": "m"}}}},
            "session.input_audio_transcription",
        ),
        ({"tools": [{"type": "web_search"}]}, "session.tools[0].type"),
        ({"tools": [{}, 5]}, "session.tools[1].type"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 1}}}}, "session.audio.input.format"),
        ({"output_audio_format": "mp3"}, "session.audio.output.format"),
        ({"audio": {"input": {"vad": 1}}}, "vad"),
        ({"model": "another"}, "model"),
    ],
)
def test_a_session_whose_cost_is_not_known_is_refused(session: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read({"type": "session.update", "session": session})
    assert refusal.value.param == param


def test_a_session_puts_its_instructions_and_tools_before_the_model() -> None:
    session = {"instructions": "x" * 100, "voice": "alloy", "tools": [{"type": "function", "name": "f"}]}
    plain = read({"type": "session.update", "session": {"voice": "alloy", "max_output_tokens": "inf"}})
    assert not plain.content
    assert 100 < read({"type": "session.update", "session": session}).content.text_bytes < 400
    assert read({"type": "session.update", "session": {"prompt": {"id": "p"}}}).content.anything


def test_the_models_other_name_is_not_asked_for() -> None:
    event = read({"type": "session.update", "session": {"model": "model"}})
    assert event.document["session"] == {}


@pytest.mark.parametrize(
    ("response", "plain"),
    [
        (None, True),
        ({}, True),
        ({"conversation": "auto", "metadata": {"a": "b"}, "output_modalities": ["text"]}, True),
        ({"conversation": "none"}, False),
        ({"instructions": "be brief"}, False),
        ({"input": []}, False),
        ({"tool_choice": "none"}, False),
    ],
)
def test_only_a_response_to_the_conversation_tells_how_long_it_is(response: Any, plain: bool) -> None:
    assert read({"type": "response.create", "response": response}).plain is plain


def test_a_responses_own_input_is_not_the_conversations() -> None:
    own = user({"type": "input_text", "text": "hello"})
    event = read({"type": "response.create", "response": {"input": [own], "instructions": "be brief"}})
    assert not event.content
    assert event.own.text_bytes > len(orjson.dumps(own))


@pytest.mark.parametrize("raw", ["", "{", "[]", "5", "{}", '{"type": 5}', '{"a":' + "[" * 60_000, "," * 600_000])
def test_what_is_no_event_is_told_from_one_that_is_refused(raw: str) -> None:
    with pytest.raises(NotAnEvent):
        read_document(raw)


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "session response item audio input output format type content text tools instructions rate role".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KINDS = ("session.update", "response.create", "conversation.item.create", "input_audio_buffer.append", "nothing")


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(("session", "response", "item", "audio")), JSON))
def test_no_event_of_a_client_does_more_than_be_refused(kind: str, members: dict[str, Any]) -> None:
    try:
        event = read({**members, "type": kind})
    except InvalidRequest:
        return
    conversation = Conversation(WINDOW, TEMPLATE)
    conversation.add(event.content)
    size = conversation.input_size(conversation.size_of(event.own))
    assert TEMPLATE <= size.most <= WINDOW
    assert size.estimated().input <= size.most


# --- the upstream's events -------------------------------------------------------------------------------------------


@given(JSON)
def test_no_event_of_an_upstream_breaks_its_reader(document: Any) -> None:
    for kind in ("response.done", "response.x.delta", "response.audio.delta", "error", "response.x.done"):
        event = read_server_event(json.dumps({"delta": document, "response": document, "item": document, "type": kind}))
        assert event is not None
        OutputTally("chunks").add(event)
    read_usage({"usage": document})


def test_output_is_counted_as_text_and_as_speech() -> None:
    tally = OutputTally("chunks")
    for kind, delta in (("output_text", "word"), ("function_call_arguments", "x" * 41), ("output_audio", SECOND)):
        event = read_server_event(json.dumps({"type": f"response.{kind}.delta", "response_id": "r", "delta": delta}))
        assert event is not None
        assert (event.response_id, event.has_output) == ("r", True)
        tally.add(event)
    assert (tally.audio_tokens, tally.tokens) == (20, 20 + 12)
    tally.take_rate(8_000)
    tally.add(event)
    assert tally.audio_tokens == 20 + 120


def test_parts_that_do_not_fit_into_a_usage_are_cut() -> None:
    usage = read_usage(
        {
            "usage": {
                "input_tokens": 100,
                "output_tokens": 50,
                "input_token_details": {"cached_tokens": 90, "audio_tokens": 60, "image_tokens": 60},
                "output_token_details": {"audio_tokens": 45, "reasoning_tokens": 45},
            }
        }
    )
    assert usage is not None
    assert usage.billed(95, 40) == Metered(
        input=95, output=40, cache_read=90, audio_input=5, image_input=0, audio_output=40, reasoning=0, requests=1
    )


@pytest.mark.parametrize("usage", [None, 5, {}, {"input_tokens": -1, "output_tokens": 5}, {"input_tokens": True}])
def test_a_usage_that_makes_no_sense_is_none(usage: Any) -> None:
    assert read_usage({"usage": usage}) is None


@pytest.mark.parametrize(
    ("format_", "rate"),
    [
        ("pcm16", 48_000),
        ({"type": "audio/pcm", "rate": 24_000}, 48_000),
        ({"type": "audio/pcm", "rate": 16_000}, 32_000),
        ({"type": "audio/pcm", "rate": 96_000}, 48_000),
        ({"type": "audio/pcmu"}, 8_000),
        ({"type": "audio/opus"}, None),
        ({"type": []}, None),
    ],
)
def test_how_long_audio_is_depends_on_its_format(format_: object, rate: int | None) -> None:
    assert bytes_per_second(format_) == rate


@given(st.binary(max_size=100))
def test_no_base64_stands_for_more_bytes_than_are_counted(data: bytes) -> None:
    encoded = base64.b64encode(data).decode()
    assert len(data) <= decoded_bytes(encoded.rstrip("=")) <= decoded_bytes(encoded)


# --- the conversation ------------------------------------------------------------------------------------------------


def test_a_conversation_grows_by_what_is_said_up_to_the_window() -> None:
    conversation = Conversation(WINDOW, TEMPLATE)
    assert conversation.input_size().most == TEMPLATE
    conversation.add(Content(100, 48_000))
    assert conversation.input_size().most == TEMPLATE + 100 + 20
    conversation.add_audio(48_000)
    conversation.add_output(50)
    assert conversation.input_size().most == TEMPLATE + 100 + 20 + 20 + 50
    assert conversation.input_size().estimated() == Metered(input=25 + 10 + 10 + 50, audio_input=20, requests=1)
    conversation.add(Content(anything=True))
    assert conversation.input_size().most == WINDOW


def test_a_usage_tells_of_what_was_sent_before_its_response_was_asked_for() -> None:
    conversation = Conversation(WINDOW, TEMPLATE)
    conversation.add(Content(1000))
    conversation.add_audio(48_000)
    conversation.commit()
    conversation.add_audio(96_000)
    reach = conversation.asked()
    conversation.add(Content(10))
    conversation.told(300, reach)
    assert conversation.input_size().most == 300 + TEMPLATE + 40 + 10
    # What a usage told of is charged as read from the cache, should no other one come.
    assert conversation.input_size().estimated() == Metered(
        input=300 + 20 + 3, cache_read=300, audio_input=20, requests=1
    )


def test_what_the_upstream_begins_by_itself_has_only_what_it_has_heard() -> None:
    conversation = Conversation(WINDOW, TEMPLATE)
    conversation.add(Content(500))
    conversation.add_audio(48_000)
    conversation.add(Content(70))  # maybe still on its way
    conversation.add_audio(96_000)
    conversation.heard(1000)
    conversation.told(200, conversation.begun())
    assert conversation.input_size().most == 200 + TEMPLATE + 70 + 40
    conversation.heard(10**9)  # more than it was sent
    conversation.told(210, conversation.begun())
    assert conversation.input_size().most == 210 + TEMPLATE


def test_audio_is_as_long_as_the_slowest_format_that_was_asked_for() -> None:
    conversation = Conversation(WINDOW, TEMPLATE)
    conversation.take_input_rate(8_000)
    conversation.take_input_rate(48_000)
    conversation.add_audio(8_000)
    assert conversation.input_size().most == TEMPLATE + 20


def test_thousands_of_items_cost_no_more_memory_and_are_all_counted() -> None:
    conversation = Conversation(10**6, 0)
    for _ in range(5000):
        conversation.add(Content(3))
    reach = conversation.asked()
    conversation.add(Content(3))
    assert conversation.input_size().most == 15_003
    conversation.told(100, reach)
    assert conversation.input_size().most >= 103
