"""POST /responses: what a request may cost, what an answer cost, and what a client gets of a stream."""

import json
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.registry import APIS
from gateway.apis.responses_stream import ResponseStream
from gateway.apis.text import MAX_SCHEMA_DEPTH
from gateway.config.model import CountOutput, Upstream
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.upstream.sse import BrokenStream, Overrun
from gateway.upstream.usage import Usage, read_response_usage
from tests.unit.figures import used

API = APIS["/responses"]
COST = {"cost": orjson.Fragment("0.000000007"), "credits": {"source": "payg"}}
QUOTA = {"ended_by": "credits"}

# --- requests --------------------------------------------------------------------------------------------------------


def read(**fields: Any) -> Ask:
    return API.read({"model": "m", "input": "Hello", **fields})


def refused(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as failure:
        read(**fields)
    return failure.value.param


def message(*parts: Any, **members: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts), **members}


TEXT = {"type": "input_text", "text": "Hello"}
ANSWERED = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": None}


@pytest.mark.parametrize(
    "given",
    [
        "Hello",
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": ""}],
        [message(TEXT, type="message")],
        [{**ANSWERED, "content": [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}]}],
        [{**ANSWERED, "content": [{"type": "refusal", "refusal": "No."}]}],
        [{**ANSWERED, "content": [{"type": "output_text", "text": "x", "annotations": [{"file_id": "f"}]}]}],
        [
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "c",
                "name": "f",
                "arguments": "{}",
                "status": "completed",
            }
        ],
        [{"type": "function_call_output", "call_id": "c", "output": "sunny"}],
        [{"type": "function_call_output", "call_id": "c", "output": [TEXT]}],
        [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}],
        [{"type": "custom_tool_call_output", "call_id": "c", "output": "x"}],
        [{"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "x"}], "content": None}],
        [{"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": None}],
    ],
)
def test_text_is_bounded_by_its_bytes(given: Any) -> None:
    assert read(input=given).input_bytes == 0  # and the body's size will be added


@pytest.mark.parametrize(
    "given",
    [
        [message(TEXT, {"type": "input_image", "image_url": "https://example.com/1.png"})],
        [message({"type": "input_file", "file_id": "file-1"})],
        [message({**TEXT, "image_url": "https://example.com/1.png"})],
        [message("Hello")],
        [message({"type": ["input_text"], "text": "Hello"})],
        [message(TEXT), {"type": "item_reference", "id": "msg_1"}],
        [{"id": "msg_1"}],
        [{"type": "message", "role": "user"}],
        [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "file_id": "f"}]}],
        [{"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}}],
        [{"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "gAAA"}],
        [{"type": "compaction", "encrypted_content": "gAAA"}],
        [{"type": "from_the_future", "text": "Hello"}],
        [{"type": ["message"], "role": "user", "content": "Hello"}],
        [{**message(TEXT), "attachments": ["file-1"]}],
    ],
)
def test_anything_else_may_fill_the_context_window(given: Any) -> None:
    assert read(input=given).input_bytes is None


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"conversation": {"id": "c"}},
        {"prompt": {"id": "p"}},
    ],
)
def test_what_the_upstream_has_stored_may_fill_the_context_window(fields: dict[str, Any]) -> None:
    for text in ("Hello", [message(TEXT)], [], None):
        assert read(input=text, **fields).input_bytes is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": ["Hello"]}, "input[0]"),
        ({"instructions": ["x"]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"background": "no"}, "background"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"text": "json"}, "text"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"from_the_future": 1}, "from_the_future"),
    ],
)
def test_what_cannot_be_priced_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields) == param


@pytest.mark.parametrize(
    "kind",
    "web_search web_search_preview file_search code_interpreter mcp image_generation computer_use_preview local_shell "
    "shell apply_patch tool_search namespace from_the_future".split(),
)
def test_a_tool_that_the_client_does_not_run_is_refused(kind: str) -> None:
    assert refused(tools=[{"type": "function", "name": "f"}, {"type": kind}]) == "tools[1].type"
    brought = {"type": "additional_tools", "role": "developer", "tools": [{"type": kind}]}
    picture = message({"type": "input_image", "file_id": "f"})
    assert refused(input=[picture, brought]) == "input[1].tools[0].type"
    assert refused(input=[{**brought, "tools": {"type": kind}}]) == "input[0].tools[0].type"


def test_the_fields_that_cost_nothing_are_let_through() -> None:
    asked = read(
        instructions="Be short.",
        max_output_tokens=50,
        max_tool_calls=3,
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto", "mode": "standard"},
        text={"format": {"type": "text"}, "verbosity": "low"},
        tools=[{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}],
        tool_choice="auto",
        parallel_tool_calls=True,
        include=["reasoning.encrypted_content"],
        store=False,
        background=False,
        temperature=0,
        top_p=1,
        top_logprobs=2,
        stream=True,
        stream_options={"include_obfuscation": False},
        service_tier="auto",
        metadata={"a": "b"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
    )
    assert (asked.stream, asked.max_tokens, asked.completions, asked.input_bytes) == (True, 50, 1, 0)
    assert read(previous_response_id=None, conversation=None, prompt=None, tools=None).input_bytes == 0


def test_schemas_count_as_large_as_templates_write_them() -> None:
    deep: Any = {"type": "string"}
    for _ in range(5):
        deep = {"type": "object", "properties": {"p": deep}}
    tool = {"type": "function", "name": "f", "parameters": deep}
    shape = {"format": {"type": "json_schema", "name": "s", "schema": deep}}
    for fields in ({"tools": [tool]}, {"text": shape}):
        assert read(**fields).template_bytes > 2 * len(json.dumps(fields, indent=4))
    for _ in range(MAX_SCHEMA_DEPTH):
        deep = {"p": deep}
    assert refused(tools=[{"type": "function", "parameters": deep}]) == "tools"


def test_the_limit_is_written_anew_with_what_is_held() -> None:
    upstream = Upstream("u", "http://127.0.0.1", None)
    asked = read(max_output_tokens=50, stream=True)
    assert API.written_anew(asked, Bound(10, 1, 30), {"max_output_tokens": 50}, upstream) == {"max_output_tokens": 30}
    assert "max_output_tokens" in API.set_fields


# --- whole answers ---------------------------------------------------------------------------------------------------

USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 14,
}
BOUND = Bound(1000, 1, 1000)
ASK = Ask("chat", "m", input_bytes=40, stream=True)


def said(text: str, **members: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg_1", "role": "assistant", "content": content, **members}


def answer(*output: Any, status: str | None = "completed", **members: Any) -> Metered | None:
    body = {"object": "response", "status": status, "error": None, "output": list(output), **members}
    read = API.read_answer(json.dumps(body).encode())
    return read and read.metered(ASK, BOUND)


def test_an_answer_costs_its_usage() -> None:
    for status in ("completed", "incomplete", None):
        assert answer(said("Hello"), status=status, usage=USAGE) == used(9, 5, cache_read=4, reasoning=2)


def test_an_answer_that_failed_is_of_no_use() -> None:
    for status in ("failed", "cancelled", "in_progress", "queued"):
        assert answer(said("Hello"), status=status, usage=USAGE) is None
    assert answer(said("Hello"), error={"message": "broke"}, usage=USAGE) is None
    for body in (b"", b"null", b"[]", b"{", b'"text"', b'{"error": {"message": "broke"}}'):
        assert API.read_answer(body) is None


@pytest.mark.parametrize(
    ("item", "tokens"),
    [
        (said("é" * 20), 10),
        ({"type": "message", "content": [{"type": "refusal", "refusal": "x" * 40}]}, 10),
        ({"type": "function_call", "id": "f" * 99, "call_id": "c" * 99, "name": "x" * 8, "arguments": "x" * 32}, 10),
        ({"type": "custom_tool_call", "call_id": "c", "name": "x" * 8, "input": "x" * 32}, 10),
        ({"type": "reasoning", "id": "r", "content": [{"type": "reasoning_text", "text": "x" * 40}]}, 10),
        ({"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x" * 40}]}, 10),
        ({"type": "from_the_future", "id": "i", "status": "completed", "said": "x" * 29}, 10),
    ],
)
def test_an_answer_without_usage_costs_what_it_says(item: dict[str, Any], tokens: int) -> None:
    for usage in (None, {}, {"input_tokens": -1, "output_tokens": 5}, {"input_tokens": 9}, 5):
        assert answer(item, usage=usage) == used(10, tokens)


def test_an_answer_that_says_nothing_costs_nothing_but_its_hidden_reasoning() -> None:
    silent = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "gAAA"}
    assert answer(usage={"input_tokens": 9, "output_tokens": 0}) == Metered()
    assert answer(silent, usage={"input_tokens": 9, "output_tokens": 1}) == Metered()
    assert answer(silent, usage={"input_tokens": 9, "output_tokens": 2}) == used(9, 2)
    assert answer(silent, status="incomplete", usage=USAGE) == used(9, 5, cache_read=4, reasoning=2)


def test_no_more_than_the_bound_is_charged() -> None:
    wild = {"input_tokens": 10**9, "output_tokens": 10**9, "input_tokens_details": {"cached_tokens": 10**9}}
    assert answer(said("Hello"), usage=wild) == used(1000, 1000, cache_read=1000)


def test_usage_is_read_with_its_details() -> None:
    assert read_response_usage(USAGE) == Usage(9, 5, cache_read_tokens=4, reasoning_tokens=2)
    assert read_response_usage({**USAGE, "input_tokens_details": None}) == Usage(9, 5, reasoning_tokens=2)


# --- streams ---------------------------------------------------------------------------------------------------------

FRAME = {"id": "resp_1", "object": "response", "created_at": 7, "model": "m", "status": "in_progress", "output": []}


def stream_of(output_tokens: int = 1000, rule: CountOutput = "chunks") -> ResponseStream:
    """The input is estimated as 10 tokens."""
    return ResponseStream(ASK, Bound(1000, 1, output_tokens), rule)


def told(*events: dict[str, Any], end: bytes = b"\n\n", named: bool = True, first: int = 0) -> bytes:
    """Events as the API sends them."""
    line_end = end[: len(end) // 2]
    return b"".join(
        (b"event: " + event["type"].encode() + line_end if named else b"")
        + b"data: "
        + json.dumps({**event, "sequence_number": number}).encode()
        + end
        for number, event in enumerate(events, first)
    )


def documents(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: ")]


def created() -> dict[str, Any]:
    return {"type": "response.created", "response": FRAME}


def added(item: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def done(item: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def part(kind: str, stem: str = "content", ending: str = "added", text: str = "", at: int = 0) -> dict[str, Any]:
    name = "response.content_part" if stem == "content" else "response.reasoning_summary_part"
    return {
        "type": f"{name}.{ending}",
        "item_id": "msg_1",
        "output_index": at,
        f"{stem}_index": 0,
        "part": {"type": kind, "refusal" if kind == "refusal" else "text": text},
    }


def delta(text: Any, stem: str = "output_text", at: int = 0, **members: Any) -> dict[str, Any]:
    where = {"item_id": "msg_1", "output_index": at, "content_index": 0, **members}
    return {"type": f"response.{stem}.delta", **where, "delta": text}


def ended(text: str, stem: str = "output_text", field: str = "text", at: int = 0) -> dict[str, Any]:
    where = {"item_id": "msg_1", "output_index": at, "content_index": 0}
    return {"type": f"response.{stem}.done", **where, field: text}


def last(*output: dict[str, Any], kind: str = "completed", **members: Any) -> dict[str, Any]:
    response = {**FRAME, "status": kind, "output": list(output), "usage": USAGE, **members}
    return {"type": f"response.{kind}", "response": response}


OPENED = (created(), added(said("")), part("output_text"))
MESSAGE = (
    *OPENED,
    delta("Hel"),
    delta("lo"),
    ended("Hello"),
    part("output_text", ending="done", text="Hello"),
    done(said("Hello")),
)
WHOLE = (*MESSAGE, last(said("Hello")))


def fed(stream: bytes | Iterable[bytes], cost: Any = None) -> tuple[bytes, ResponseStream]:
    events = stream_of()
    chunks = [stream] if isinstance(stream, bytes) else stream
    return b"".join(map(events.feed, chunks)) + events.end() + events.closing(cost), events


def cut(*events: dict[str, Any], covered: int = 2, cost: Any = COST) -> tuple[list[dict[str, Any]], ResponseStream]:
    """What a client gets at the end of a stream whose credits end after the tokens covered."""
    follower = stream_of()
    shown = follower.feed(told(*events), covered)
    assert follower.waiting
    follower.cut_short(QUOTA)
    closing = documents(follower.closing(cost))
    numbers = [event["sequence_number"] for event in documents(shown) + closing]
    assert numbers == list(range(len(numbers)))
    return closing, follower


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted(cuts), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_a_stream_is_charged_by_its_last_event_which_says_the_cost() -> None:
    out, events = fed(told(*WHOLE), cost=COST)
    assert events.done
    assert events.metered(complete=True) == used(9, 5, cache_read=4, reasoning=2)
    shown = documents(out)
    usage = {**USAGE, "cost": 0.000000007, "credits": {"source": "payg"}}
    assert shown[:-1] == documents(told(*MESSAGE))
    assert shown[-1] == {**last(said("Hello"), usage=usage), "sequence_number": len(MESSAGE)}
    assert b'event: response.completed\ndata: {"type":"response.completed"' in out


def test_without_a_settlement_the_client_gets_the_stream_as_it_came() -> None:
    assert fed(told(*WHOLE))[0] == told(*WHOLE)


def test_a_last_event_without_usage_gets_what_was_charged() -> None:
    out, events = fed(told(*MESSAGE, last(said("Hello"), usage=None)), cost=COST)
    assert events.metered(complete=True) == used(10, 2)
    usage = documents(out)[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (10, 2, 12)
    assert usage["credits"] == {"source": "payg"}


_ITEMS: dict[str, tuple[dict[str, Any], ...]] = {
    "message": MESSAGE[1:],
    "refusal": (
        added(said("", content=[])),
        part("refusal"),
        delta("No.", "refusal"),
        ended("No.", "refusal", "refusal"),
        done({**said(""), "content": [{"type": "refusal", "refusal": "No."}]}),
    ),
    "call": (
        added({"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": ""}),
        delta('{"a"', "function_call_arguments"),
        delta(":1}", "function_call_arguments"),
        ended('{"a":1}', "function_call_arguments", "arguments"),
        done({"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": '{"a":1}'}),
    ),
    "custom": (
        added({"type": "custom_tool_call", "id": "ct_1", "call_id": "c", "name": "f", "input": ""}),
        delta("ls", "custom_tool_call_input"),
        ended("ls", "custom_tool_call_input", "input"),
        done({"type": "custom_tool_call", "id": "ct_1", "call_id": "c", "name": "f", "input": "ls"}),
    ),
    "reasoning": (
        added({"type": "reasoning", "id": "rs_1", "summary": []}),
        part("summary_text", "summary"),
        delta("Hm", "reasoning_summary_text", summary_index=0),
        ended("Hm", "reasoning_summary_text"),
        part("summary_text", "summary", "done", "Hm"),
        delta("Deep", "reasoning_text"),
        ended("Deep", "reasoning_text"),
        done(
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "Hm"}],
                "content": [{"type": "reasoning_text", "text": "Deep"}],
            }
        ),
    ),
}


@pytest.mark.parametrize(
    ("kind", "events"), [("message", 2), ("refusal", 1), ("call", 3), ("custom", 2), ("reasoning", 2)]
)
def test_what_is_told_twice_counts_once(kind: str, events: int) -> None:
    """And the name of a call counts as something that was said."""
    stream = stream_of()
    item = _ITEMS[kind]
    stream.feed(told(created(), *item, last(item[-1]["item"], usage=None)))
    assert stream.counted == events
    assert stream.metered(complete=True) == used(10, events)


def test_what_no_delta_told_counts_where_it_is_first_told() -> None:
    silent = [event for event in MESSAGE if not event["type"].endswith(".delta")]
    for first in range(3, len(silent) + 1):
        stream = stream_of()
        stream.feed(told(*silent[:3], *silent[first:], last(said("Hello"), usage=None)))
        assert stream.metered(complete=True) == used(10, 2), first  # five bytes
    call = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}
    for item in (call, {"type": "from_the_future", "id": "i", "said": "x"}):
        stream = stream_of()
        stream.feed(told(created(), done(item)))
        assert stream.has_output


def test_an_item_is_known_by_its_id_where_the_server_tells_no_places() -> None:
    placeless = [{name: value for name, value in event.items() if not name.endswith("_index")} for event in (*MESSAGE,)]
    other = [json.loads(json.dumps(event).replace("msg_1", "msg_2")) for event in placeless[1:]]
    stream = stream_of()
    stream.feed(told(*placeless, *other, last(said("Hello"), said("Hello"), usage=None)))
    assert stream.metered(complete=True) == used(10, 4)


def test_a_delta_that_is_no_text_counts_too() -> None:
    stream = stream_of()
    stream.feed(told(created(), delta({"text": "Hm"}, "reasoning"), delta("", "output_text"), delta(None)))
    assert stream.counted == 4  # {"text":"Hm"} has 13 bytes


def test_output_beyond_what_is_covered_waits_with_all_that_follows() -> None:
    stream = stream_of()
    shown = stream.feed(told(*WHOLE), covered=1)
    assert shown == told(*WHOLE[:4])
    assert (stream.waiting, stream.wanted, stream.counted, stream.done) == (True, 2, 1, False)
    assert stream.feed(b": ping\n\n", 1) == b""
    assert stream.release(1) == b""
    assert stream.release(2) == told(*WHOLE[4:-1], first=4)
    assert stream.done
    assert stream.closing(None) == told(*WHOLE[-1:], first=len(MESSAGE))


def test_a_whole_answer_in_the_last_event_waits_for_cover() -> None:
    stream = stream_of()
    assert stream.feed(told(created(), last(said("x" * 40)))) == told(created())
    covered = stream_of()
    assert covered.feed(told(created(), last(said("x" * 40))), covered=9) == told(created())
    assert (covered.waiting, covered.wanted) == (True, 10)


def test_by_bytes_every_byte_is_a_token() -> None:
    stream = stream_of(rule="bytes")
    stream.feed(told(*OPENED, delta("é\n\U0001f600")))
    assert stream.counted == 7


# --- ends ------------------------------------------------------------------------------------------------------------


def test_when_credits_end_everything_open_is_closed() -> None:
    closing, events = cut(*OPENED, delta("Hel"), delta("lo"), delta(" there"))
    assert [event["type"] for event in closing] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text, content, item, end = closing
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    assert text == {**text, **where, "text": "Hello", "logprobs": []}
    assert content == {**content, **where, "part": {"type": "output_text", "text": "Hello", "annotations": []}}
    assert item["item"] == said("Hello", status="incomplete")
    assert end["quota"] == QUOTA
    response = end["response"]
    assert response["id"] == "resp_1"
    assert response["output"] == [item["item"]]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (10, 2)
    assert response["usage"]["cost"] == 0.000000007
    assert events.metered(complete=False) == used(10, 2)


@pytest.mark.parametrize(("kind", "field"), [("call", "arguments"), ("custom", "input")])
def test_half_a_call_is_shown_and_not_done(kind: str, field: str) -> None:
    """Who runs what is done would run something else. What was closed before stays as it was."""
    opened, *rest = _ITEMS[kind]
    half = {**rest[0], "output_index": 1}
    closing, _ = cut(*MESSAGE, {**opened, "output_index": 1}, half, delta("x", at=1), covered=4)
    assert [event["type"] for event in closing] == ["response.incomplete"]
    call = {**opened["item"], field: half["delta"], "status": "incomplete"}
    assert closing[0]["response"]["output"] == [said("Hello"), call]


def test_reasoning_is_closed_too() -> None:
    events = (created(), *_ITEMS["reasoning"][:3], delta("Deep", "reasoning_text"), delta("er", "reasoning_text"))
    closing, _ = cut(*events)
    assert [event["type"] for event in closing] == [
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.reasoning_text.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    item = closing[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "Hm"}]
    assert item["content"] == [{"type": "reasoning_text", "text": "Deep"}]


def test_a_part_that_has_ended_is_not_ended_again() -> None:
    closing, _ = cut(*MESSAGE[:6], delta("more", at=1), covered=2)
    assert [event["type"] for event in closing][:2] == ["response.content_part.done", "response.output_item.done"]


def test_a_character_that_came_in_halves_is_whole_at_the_end() -> None:
    closing, _ = cut(*OPENED, delta("\ud83d"), delta("\ude00"), delta("!"), covered=3)
    assert closing[0]["text"] == "\U0001f600"


def test_what_is_hard_to_write_is_written_at_the_end() -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"p": deep}
    for odd in (said("\ud83d"), said("Hello", extra=deep)):
        closing, _ = cut(*MESSAGE[:-1], done(odd), delta("x", at=1), covered=2)
        assert closing[-1]["type"] == "response.incomplete"
        assert closing[-1]["response"]["output"] == [odd]


def test_numbers_go_on_where_the_server_gives_none() -> None:
    stream = stream_of()
    for event in (*OPENED, delta("a"), delta("b")):
        stream.feed(b"data: " + json.dumps(event).encode() + b"\n\n", 1)
    stream.cut_short(QUOTA)
    assert [event["sequence_number"] for event in documents(stream.closing(COST))] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ({"type": "response.failed", "response": {**FRAME, "status": "failed", "usage": USAGE}}, True),
        ({"type": "error", "code": "server_error", "message": "broke", "param": None}, True),
        ({"type": "error", "error": {"message": "broke"}}, True),
        ({"type": "", "error": {"message": "broke"}}, True),
        ({"type": "", "object": "error", "message": "broke"}, False),
    ],
)
def test_a_failure_is_shown_as_it_came_and_not_charged(event: dict[str, Any], shown: bool) -> None:
    stream = told(*OPENED, delta("a"), event)
    out, events = fed(stream + told(last(said("a"))), cost=COST)
    assert out == stream
    assert (events.failed, events.done, events.error_shown) == (True, True, shown)


def test_a_stream_without_a_last_event_has_no_end() -> None:
    for tail in (b"", b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE]"):
        out, events = fed(told(*MESSAGE) + tail)
        assert out == told(*MESSAGE)
        assert not events.done
        assert not events.failed
        assert events.metered(complete=False) == used(10, 2)


def test_a_mark_behind_the_last_event_is_left_out() -> None:
    out, events = fed(told(*WHOLE) + b"data: [DONE]\n\n")
    assert out == told(*WHOLE)
    assert events.done


def test_a_last_event_without_its_blank_line_is_one() -> None:
    out, events = fed(told(*WHOLE)[:-2])
    assert out == told(*WHOLE)
    assert events.done


def test_an_upstream_that_does_not_stop_is_cut() -> None:
    stream = stream_of(output_tokens=10)
    with pytest.raises(Overrun):
        for _ in range(200):
            stream.feed(told(delta("a")))


def test_an_answer_that_no_event_could_hold_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.apis.responses_items.MAX_EVENT_BYTES", 2000)
    stream = stream_of()
    for _ in range(14):
        stream.feed(told(delta("a" * 100)))
    with pytest.raises(BrokenStream):
        for _ in range(6):
            stream.feed(told(delta("a" * 100)))


def test_what_is_kept_of_an_answer_that_shows_nothing_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.apis.responses_items.MAX_EVENT_BYTES", 20_000)
    secret = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x" * 4000}
    stream = stream_of()
    for index in range(4):
        for event in (added(secret, index), done(secret, index)):  # one takes the place of the other
            stream.feed(told(event))
    with pytest.raises(BrokenStream):
        stream.feed(told(added(secret, 4)))
    frame = {"type": "response.created", "response": {**FRAME, "instructions": "x" * 20_000}}
    with pytest.raises(BrokenStream):
        stream_of().feed(told(frame))
    empty = [delta("", content_index=index) for index in range(100)]
    with pytest.raises(BrokenStream):
        stream_of().feed(told(created(), *empty))
    noted = part("output_text")
    noted["part"]["annotations"] = ["x" * 4000]
    with pytest.raises(BrokenStream):
        stream_of().feed(told(created(), *[{**noted, "content_index": index} for index in range(6)]))


def test_what_was_told_whole_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.apis.responses_items.MAX_EVENT_BYTES", 20_000)
    stream = stream_of()
    for index in range(4):
        stream.feed(told(added(said(""), index), delta("x" * 3000, at=index), done(said("x" * 3000), index)))
    assert stream.counted == 3000


def test_an_error_is_one_for_every_client() -> None:
    stream = stream_of()
    stream.feed(told(*OPENED))
    error = {"message": "broke", "type": "api_error", "param": None, "code": "upstream_unavailable"}
    event = stream.error_event(json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode())
    assert event.startswith(b"event: error\ndata: {")
    assert documents(event) == [
        {
            "type": "error",
            "code": "upstream_unavailable",
            "message": "broke",
            "param": None,
            "sequence_number": 3,
            "error": error,
            "request_id": "req_1",
        }
    ]


# --- bytes -----------------------------------------------------------------------------------------------------------

_LINE_ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])
_STRANGE = st.sampled_from(
    [
        b": keep-alive",
        b"event: ping\nid: 7",
        b"data: {not json",
        b"data: \xff\xfe",
        b"retry: 5",
        b"data: null",
        b"data: 5",
        b"data: [DONE]",
        b'data: {"type": 5}',
        b'data: {"type": "response.output_item.done", "item": 5}',
        b'data: {"type": "response.output_item.added", "item": {"type": ["message"]}}',
        b'data: {"type": "response.output_item.added", "item": {"type": "message", "content": [{"type": []}, 5]}}',
        b'data: {"type": "response.content_part.added", "output_index": {}, "item_id": [], "part": {"type": {}}}',
    ]
)


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    end, named = draw(_LINE_ENDS), draw(st.booleans())
    events = [created()]
    for index, kind in enumerate(draw(st.lists(st.sampled_from(sorted(_ITEMS)), max_size=3))):
        events += [{**event, "output_index": index} for event in _ITEMS[kind]]
    events += draw(st.lists(st.text(max_size=9).map(delta), max_size=3))
    if draw(st.booleans()):
        events.append(
            draw(st.sampled_from([last(said("Hello")), last(kind="incomplete"), {"type": "error", "message": "x"}]))
        )
    stream = b""
    for number, event in enumerate(events):
        stream += told(event, end=end, named=named, first=number)
        stream += b"".join(strange + end for strange in draw(st.lists(_STRANGE, max_size=1)))
    return stream


@given(_streams(), st.data(), st.integers(0, 12))
def test_however_a_stream_is_cut_the_client_gets_the_same(stream: bytes, data: st.DataObject, covered: int) -> None:
    chunks = pieces(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    ends = []
    for parts in (chunks, [stream]):
        events = stream_of()
        shown = b"".join(events.feed(chunk, covered) for chunk in parts) + events.end(covered)
        assert events.counted <= covered
        figures = (events.counted, events.waiting, events.wanted, events.usage, events.done, events.failed)
        if events.waiting:
            events.cut_short(QUOTA)
        ends.append((shown + events.closing(COST), figures, [events.metered(complete=c) for c in (False, True)]))
    assert ends[0] == ends[1]


@given(st.lists(st.binary(max_size=8) | st.sampled_from([told(event) for event in WHOLE]) | _STRANGE, max_size=20))
def test_no_bytes_are_too_strange(chunks: list[bytes]) -> None:
    fed(chunks)
    fed([chunk + b"\n\n" for chunk in chunks], cost=COST)
