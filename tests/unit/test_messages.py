"""POST /messages: what a request asks for, what a client gets of a stream however it was cut, and what is charged."""

import json
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.messages import MAX_BLOCK_DEPTH, Messages
from gateway.apis.messages_stream import MessageStream
from gateway.config.model import Upstream
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.http import errors
from gateway.http.errors import Failure
from gateway.upstream import sse
from gateway.upstream.sse import BrokenStream, Overrun
from gateway.upstream.usage import Answer, Usage
from tests.unit.figures import used

COST = {"cost": orjson.Fragment("0.000000007"), "credits": {"source": "payg"}}
QUOTA = {"ended_by": "credits"}
API = Messages()
UPSTREAM = Upstream("test", "http://127.0.0.1:1/v1", None)


# --- streams ---------------------------------------------------------------------------------------------------------


def event(kind: str, *, end: bytes = b"\n", **members: Any) -> bytes:
    data = json.dumps({"type": kind, **members}, ensure_ascii=False).encode()
    return b"event: " + kind.encode() + end + b"data: " + data + end + end


def usage(fresh: int = 5, output: int = 1, *, read: int = 0, written: int = 0) -> dict[str, int]:
    return {
        "input_tokens": fresh,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": output,
    }


def start(**figures: int) -> bytes:
    return event("message_start", message={"type": "message", "content": [], "usage": usage(**figures)})


def opened(index: int = 0, **block: Any) -> bytes:
    return event("content_block_start", index=index, content_block={"type": "text", "text": "", **block})


def delta(kind: str = "text_delta", index: int = 0, **members: Any) -> bytes:
    return event("content_block_delta", index=index, delta={"type": kind, **members})


def words(text: str, index: int = 0) -> bytes:
    return delta(index=index, text=text)


def closed(index: int = 0) -> bytes:
    return event("content_block_stop", index=index)


def ended(*, reason: str = "end_turn", sequence: str | None = None, **members: Any) -> bytes:
    return event("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, **members)


PING = event("ping")
STOP = event("message_stop")
#: A whole stream of two words, charged as 5 + 2 + 3 tokens of input and 7 of output.
WHOLE = (
    start(fresh=5, read=2, written=3)
    + opened()
    + PING
    + words("Hello")
    + words(" you")
    + closed()
    + ended(usage={"output_tokens": 7})
    + STOP
)


def stream_of(*, output_tokens: int = 1000) -> MessageStream:
    """The input is estimated as 10 tokens."""
    ask = Ask("chat", "m", input_bytes=40, stream=True, wants_usage=True)
    return MessageStream(ask, Bound(1000, 1, output_tokens))


def fed(stream: bytes | Iterable[bytes], *, cost: Any = None) -> tuple[bytes, MessageStream]:
    """Everything that the client of a stream gets, and the follower afterwards."""
    events = stream_of()
    chunks = [stream] if isinstance(stream, bytes) else stream
    return b"".join(events.feed(chunk) for chunk in chunks) + events.end() + events.closing(cost), events


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted(cuts), len(stream)]
    return [stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def documents(stream: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: ")]


_FIGURE = st.none() | st.integers(-1, 9)
_USAGES = st.one_of(
    st.sampled_from([None, 5, [], {}]),
    st.fixed_dictionaries(
        {},
        optional={
            "input_tokens": _FIGURE,
            "output_tokens": _FIGURE,
            "cache_read_input_tokens": _FIGURE,
            "cache_creation_input_tokens": _FIGURE,
        },
    ),
)
_TEXTS = st.text(max_size=20) | st.sampled_from(['", "text": "', "message_stop", "error", "\n\ndata: ", "\\"])
_INDEXES = st.integers(0, 2)
_EVENTS = st.one_of(
    st.builds(lambda reported: event("message_start", message={"usage": reported}), _USAGES),
    st.builds(opened, _INDEXES),
    st.builds(lambda index: opened(index, type="tool_use", name="go", input={"a": "b"}), _INDEXES),
    st.builds(words, _TEXTS, _INDEXES),
    st.builds(lambda text: delta("input_json_delta", partial_json=text), _TEXTS),
    st.builds(lambda text: delta("thinking_delta", thinking=text), _TEXTS),
    st.builds(lambda text: delta("unheard_of_delta", said=text), _TEXTS),
    st.builds(closed, _INDEXES),
    st.builds(lambda reported: ended(usage=reported), _USAGES),
    st.sampled_from([PING, b": keep-alive\n\n", b"data: {not json\n\n", b"data: \xff\xfe\n\n", b"retry: 5\n\n"]),
)


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """A stream that comes to its end, whatever it says on the way there."""
    stream = b"".join(draw(st.lists(_EVENTS, max_size=10))) + STOP
    return stream.replace(b"\n", draw(st.sampled_from([b"\n", b"\r\n", b"\r"])))


@given(_streams(), st.data())
def test_however_a_stream_is_cut_the_client_gets_the_same(stream: bytes, data: st.DataObject) -> None:
    chunks = pieces(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    out, cut = fed(chunks)
    assert out == stream
    _, once = fed(stream)
    assert (cut.usage, cut.done, cut.failed, cut.counted) == (once.usage, once.done, once.failed, once.counted)
    for complete in (False, True):
        assert cut.metered(complete=complete) == once.metered(complete=complete)
    assert fed(chunks, cost=COST)[0] == fed(stream, cost=COST)[0]


@given(_streams(), st.data(), st.integers(0, 30))
def test_however_a_stream_is_cut_no_more_is_handed_out_than_is_covered(
    stream: bytes, data: st.DataObject, covered: int
) -> None:
    def until_it_waits(chunks: list[bytes]) -> tuple[bytes, MessageStream]:
        events = stream_of()
        return b"".join(events.feed(chunk, covered) for chunk in chunks), events

    chunks = pieces(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    out, cut = until_it_waits(chunks)
    whole, once = until_it_waits([stream])
    assert (out, cut.waiting, cut.counted, cut.wanted) == (whole, once.waiting, once.counted, once.wanted)
    assert cut.counted <= covered
    rest = cut.release(sse.UNLIMITED) + cut.closing(None) if cut.waiting else cut.closing(None)
    assert out + rest == stream


_FRAGMENTS = st.binary(max_size=8) | st.sampled_from(
    [
        *(b"event: ", b"data: ", b"\n\n", b"\r\n", b"\r", b"}", b"null", b"message_stop", b"error", b'{"type": '),
        *(b'data: {"type": "message_delta"}\n\n', b'data: {"type": "content_block_start", "index": []}\n\n'),
        *(b'data: {"type": []}\n\n', b'data: {"type": "message_start", "message": 5}\n\n', words("a"), ended(), STOP),
    ]
)


@given(st.lists(_FRAGMENTS, max_size=20))
def test_no_bytes_are_too_strange(chunks: list[bytes]) -> None:
    events = stream_of()
    out = b"".join(events.feed(chunk) for chunk in chunks)
    assert b"".join(chunks).startswith(out)
    events.closing(COST)
    events.cut_short(QUOTA)
    assert documents(events.closing(COST))[-1] == {"type": "message_stop"}


def test_each_event_is_handed_out_as_soon_as_it_is_whole() -> None:
    events = stream_of()
    first = words("a")
    assert events.feed(first[:10]) == b""
    assert events.feed(first[10:] + b"event: ") == first
    assert not events.done


def test_input_has_all_that_the_cache_read_and_wrote() -> None:
    out, events = fed(WHOLE)
    assert out == WHOLE
    assert events.done and not events.failed
    assert events.metered(complete=True) == used(10, 7, cache_read=2, cache_write=3)


def test_the_last_value_of_each_figure_counts() -> None:
    reported = {"input_tokens": 6, "cache_read_input_tokens": None, "output_tokens": 9}
    _, events = fed(
        start(fresh=5, read=2) + words("a") + ended(usage={"output_tokens": 3}) + ended(usage=reported) + STOP
    )
    assert events.metered(complete=True) == used(8, 9, cache_read=2)


def test_a_usage_is_believed_no_further_than_the_bound() -> None:
    _, events = fed(start(fresh=10**12, read=10**12) + words("a") + ended(usage={"output_tokens": 10**12}) + STOP)
    assert events.metered(complete=True) == used(1000, 1000, cache_read=1000)
    _, events = fed(start(fresh=-5) + words("a") + ended(usage={"output_tokens": -1}) + STOP)
    assert events.metered(complete=True) == used(10, 1)


def test_without_a_usage_bytes_and_events_are_charged() -> None:
    _, events = fed(words("a") + words("x" * 37) + ended() + STOP)
    assert events.metered(complete=True) == used(10, 10)


def test_without_a_last_report_at_least_what_was_shown_is_charged() -> None:
    _, events = fed(start(fresh=5, output=1) + words("x" * 40) + ended() + STOP)
    assert events.metered(complete=True) == used(5, 10)
    events = stream_of()
    events.feed(start(fresh=5, output=1) + words("x" * 40))
    assert events.metered(complete=False) == used(5, 10)


@pytest.mark.parametrize("together", [False, True])
def test_a_report_that_more_text_came_after_is_not_the_last(together: bool) -> None:
    begun = [start(), words("a"), ended(usage={"output_tokens": 3})]
    more = [opened(1), *[words("word", 1)] * 100]
    end = STOP
    said, stream = fed([*begun, b"".join(more), end] if together else [*begun, *more, end])
    assert said.count(b"word") == 100
    assert stream.metered(complete=True).output == 101


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        (words("x" * 40), 10),
        (delta("input_json_delta", partial_json="x" * 40), 10),
        (delta("thinking_delta", thinking="x" * 40), 10),
        (delta("signature_delta", signature="x" * 40), 10),
        (delta("unheard_of_delta", said="x" * 40), 4),
        (opened(type="redacted_thinking", data="x" * 40), 10),
        (opened(type="tool_use", id="toolu_1", name="x" * 40, input={}), 10),
        (opened(text="x" * 40), 10),
        (words(""), 0),
        (delta("citations_delta", citation={"cited_text": "x" * 40}), 0),
        (ended(reason="stop_sequence", sequence="yes"), 1),
        (PING, 0),
    ],
)
def test_what_is_output_is_counted(said: bytes, tokens: int) -> None:
    events = stream_of()
    events.feed(start() + said)
    assert events.counted == tokens


def test_a_call_told_at_once_is_counted_whole() -> None:
    events = stream_of()
    events.feed(opened(type="tool_use", name="go", input={"city": "x" * 400}))
    assert events.counted >= 100


def test_nothing_is_charged_for_nothing() -> None:
    _, events = fed(start() + ended(usage={"output_tokens": 1}) + STOP)
    assert events.metered(complete=True) == Metered()


def test_an_empty_message_of_more_than_its_end_is_charged_for() -> None:
    _, events = fed(start() + ended(usage={"output_tokens": 2}) + STOP)
    assert events.metered(complete=True) == used(5, 2)


def test_a_prompt_that_was_kept_is_charged_for_even_without_an_answer() -> None:
    """The next request reads it for a tenth of the price."""
    _, events = fed(start(fresh=5, written=200) + ended(usage={"output_tokens": 1}) + STOP)
    assert events.metered(complete=True) == used(205, 1, cache_write=200)
    whole = {"type": "message", "content": [], "usage": usage(5, 1, written=200)}
    read = Messages().read_answer(json.dumps(whole).encode())
    assert read is not None
    assert read.metered(Ask("chat", "m", input_bytes=40), Bound(1000, 1, 1000)) == used(205, 1, cache_write=200)


def test_a_figure_that_becomes_less_at_the_end_stays() -> None:
    reported = {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 3}
    _, events = fed(start(fresh=900, read=40) + words("a") + ended(usage=reported) + STOP)
    assert events.metered(complete=True) == used(940, 3, cache_read=40)


def test_thinking_that_is_not_shown_is_charged_by_the_usage() -> None:
    reported = {"output_tokens": 30, "output_tokens_details": {"thinking_tokens": 30}}
    _, events = fed(start() + ended(usage=reported) + STOP)
    assert events.metered(complete=True) == replace(used(5, 30), reasoning=30)


def test_the_cost_is_in_the_last_usage() -> None:
    out, _ = fed(WHOLE, cost=COST)
    before, _, last = out.partition(b"event: message_delta")
    assert before + ended(usage={"output_tokens": 7}) + STOP == WHOLE
    final, stop = documents(last)
    assert final["usage"] == {"output_tokens": 7, "cost": 7e-9, "credits": {"source": "payg"}}
    assert final["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert stop == {"type": "message_stop"}


def test_an_end_without_usage_gets_what_is_charged() -> None:
    out, _ = fed(start(fresh=5, read=2) + words("x" * 40) + ended() + STOP, cost=COST)
    assert documents(out)[-2]["usage"] | COST == {**usage(5, 10, read=2), **COST}


def test_pings_and_comments_do_not_part_the_usage_from_the_end() -> None:
    between = PING + b": keep-alive\n\n"
    out, _ = fed(words("a") + ended(usage=usage()) + between + STOP, cost=COST)
    assert out.endswith(between + STOP)
    assert [document["usage"]["cost"] for document in documents(out) if "usage" in document] == [7e-9]


def test_pings_without_end_are_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.apis.messages_stream.MAX_EVENT_BYTES", 100)
    events = stream_of()
    events.feed(ended())
    with pytest.raises(BrokenStream):
        events.feed(PING * 10)


def test_what_comes_after_the_end_is_dropped() -> None:
    assert fed(WHOLE + words("more"))[0] == WHOLE


def test_an_end_without_its_blank_line_gets_one() -> None:
    out, events = fed(WHOLE.rstrip(b"\n"))
    assert (out, events.done) == (WHOLE, True)


@pytest.mark.parametrize("missing", [STOP, WHOLE[WHOLE.index(b"event: message_delta") :], WHOLE[-10:]])
def test_a_stream_without_its_end_is_not_done(missing: bytes) -> None:
    assert not fed(WHOLE.replace(missing, b""))[1].done


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (event("error", error={"type": "overloaded_error", "message": "Overloaded"}), True),
        (b"event: error\ndata: Overloaded\n\n", True),
        (b'data: {"type": "error", "error": {"message": "Overloaded"}}\n\n', False),
        (b'data: {"error": {"message": "Overloaded"}}\n\n', False),
    ],
)
def test_an_upstreams_error_ends_the_stream_as_it_came(error: bytes, shown: bool) -> None:
    out, events = fed(start() + words("a") + error + words("b") + STOP)
    assert out == start() + words("a") + error
    assert (events.failed, events.error_shown) == (True, shown)


def test_the_word_error_is_no_error() -> None:
    stream = words('error", "error": {"message_stop') + words("error") + words("a")
    out, events = fed(stream)
    assert (out, events.failed, events.done) == (stream, False, False)


def test_the_gateways_own_error_has_the_name_that_sdks_look_for() -> None:
    assert stream_of().error_event(b"{}") == b"event: error\ndata: {}\n\n"


def test_output_that_is_not_covered_waits_with_all_behind_it() -> None:
    events = stream_of()
    block = start() + opened() + words("a") + words("b")
    assert events.feed(block + words("c") + closed(), covered=2) == block
    assert (events.waiting, events.counted, events.wanted) == (True, 2, 3)
    assert events.feed(ended(usage={"output_tokens": 3}) + STOP, covered=2) == b""
    assert events.release(3) == words("c") + closed()
    assert events.done
    assert events.closing(None) == ended(usage={"output_tokens": 3}) + STOP


def test_when_credits_end_what_is_open_is_closed() -> None:
    events = stream_of()
    call = opened(1, type="tool_use", name="go", input={})
    shown = start(fresh=5, read=2) + opened() + words("x" * 40) + closed() + call + opened(2) + words("y", 2)
    assert events.feed(shown + words("z" * 8, 2), covered=11) == shown
    events.cut_short(QUOTA)
    assert events.metered(complete=False) == used(7, 11, cache_read=2)
    *stops, final, last = documents(events.closing(COST))
    assert stops == [{"type": "content_block_stop", "index": index} for index in (1, 2)]
    assert final == {
        "type": "message_delta",
        "delta": {"stop_reason": "max_tokens", "stop_sequence": None},
        "usage": {**usage(5, 11, read=2), "cost": 7e-9, "credits": {"source": "payg"}},
        "quota": QUOTA,
    }
    assert last == {"type": "message_stop"}


def test_an_upstream_that_does_not_stop_is_cut() -> None:
    events = stream_of(output_tokens=10)
    with pytest.raises(Overrun):
        for _ in range(100):
            events.feed(words("a"))


# --- whole answers ---------------------------------------------------------------------------------------------------


def message(*blocks: dict[str, Any], **members: Any) -> bytes:
    return json.dumps({"type": "message", "content": list(blocks), "stop_sequence": None, **members}).encode()


def metered(answer: Answer | None) -> Metered:
    """The input is estimated as 10 tokens."""
    assert answer is not None
    return answer.metered(Ask("chat", "m", input_bytes=40), Bound(1000, 1, 100))


def test_a_message_is_charged_by_its_usage() -> None:
    answer = API.read_answer(message({"type": "text", "text": "Hi"}, usage=usage(5, 7, read=2, written=3)))
    assert answer is not None
    assert answer.usage == Usage(10, 7, 2, 3)
    assert metered(answer) == used(10, 7, cache_read=2, cache_write=3)


@pytest.mark.parametrize(
    "reported", [None, {}, {"input_tokens": 5}, usage(-1, 5), usage(5, -1), {"output_tokens": 1.5}]
)
def test_a_message_without_a_usage_is_estimated(reported: Any) -> None:
    blocks = [
        {"type": "thinking", "thinking": "x" * 20},
        {"type": "tool_use", "id": "toolu_1", "name": "y" * 20, "input": {}},
    ]
    assert metered(API.read_answer(message(*blocks, usage=reported))) == used(10, 10)


def test_an_empty_message_costs_nothing_unless_its_stop_sequence_says_something() -> None:
    assert metered(API.read_answer(message(usage=usage(5, 1)))) == Metered()
    assert metered(API.read_answer(message(usage=usage(5, 1), stop_sequence="yes"))) == used(5, 1)
    assert metered(API.read_answer(message(usage=usage(5, 2)))) == used(5, 2)


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b'{"type": "error", "error": {}}', b'{"choices": []}'])
def test_what_is_no_message_is_of_no_use(body: bytes) -> None:
    assert API.read_answer(body) is None


# --- requests --------------------------------------------------------------------------------------------------------


def body_of(*blocks: Any, **fields: Any) -> dict[str, Any]:
    content = list(blocks) if blocks else "Hello!"
    return {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": content}], **fields}


TEXT = {"type": "text", "text": "Hello!", "cache_control": {"type": "ephemeral", "ttl": "5m"}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
SCHEMA = {"name": "go", "description": "goes", "input_schema": {"type": "object", "properties": {}}}


def result_of(*blocks: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(blocks)}


@pytest.mark.parametrize(
    "body",
    [
        body_of(),
        body_of(TEXT),
        body_of(
            system="Be brief.", stop_sequences=["x"], temperature=0.5, top_k=5, top_p=0.9, metadata={"user_id": "u"}
        ),
        body_of(system=[TEXT], service_tier="auto", cache_control={"type": "ephemeral"}),
        body_of(tools=[SCHEMA, {**SCHEMA, "type": "custom", "strict": True}], tool_choice={"type": "auto"}),
        body_of({"type": "tool_use", "id": "toolu_1", "name": "go", "input": {"a": [1]}}, result_of(TEXT)),
        body_of({"type": "tool_result", "tool_use_id": "toolu_1", "content": "done", "is_error": False}),
        body_of(
            {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}, {"type": "redacted_thinking", "data": "c2ln"}
        ),
        body_of(thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"}),
        body_of(thinking={"type": "adaptive"}, output_config={"effort": "low"}),
        body_of(container=None, mcp_servers=None),
    ],
)
def test_text_is_bounded_by_its_bytes(body: dict[str, Any]) -> None:
    ask = API.read(body)
    assert (ask.model, ask.max_tokens, ask.input_bytes, ask.stream) == ("m", 100, 0, False)


@pytest.mark.parametrize(
    "body",
    [
        body_of(IMAGE),
        body_of(result_of(TEXT, IMAGE)),
        body_of({"type": "document", "source": {"type": "file", "file_id": "file_1"}}),
        body_of({"type": "search_result", "content": [TEXT]}),
        body_of({**TEXT, "file_id": "file_1"}),
        body_of({**TEXT, "text": [IMAGE]}),
        body_of(result_of(TEXT, result_of(TEXT, result_of(IMAGE)))),
        body_of({"type": "tool_result", "tool_use_id": "toolu_1", "content": IMAGE}),
        body_of(system=[result_of(IMAGE)]),
        body_of({"type": ["text"]}),
        body_of(system=[IMAGE]),
        body_of(messages=[{"role": "user", "content": "Hello!", "container": "c_1"}]),
        *(
            body_of(tools=[SCHEMA, {"type": kind, "name": "x"}])
            for kind in ("bash_20250124", "text_editor_20250728", "computer_20250124", "memory_20250818")
        ),
    ],
)
def test_what_may_be_more_than_its_bytes_is_bounded_by_the_context_window(body: dict[str, Any]) -> None:
    assert API.read(body).input_bytes is None


def test_what_a_template_may_write_of_schemas_and_calls_is_bounded() -> None:
    bytes_of = {"tools": [SCHEMA], "output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}}
    for name, value in bytes_of.items():
        assert API.read(body_of(**{name: value})).template_bytes > 2 * len(json.dumps(value, separators=(",", ":")))
    call = {"type": "tool_use", "id": "toolu_1", "name": "go", "input": {"quoted": '"' * 50}}
    assert API.read(body_of(call)).template_bytes > 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m", "messages": [{"role": "user", "content": "Hello!"}]}, "max_tokens"),
        (body_of(max_tokens=None), "max_tokens"),
        (body_of(max_tokens=0), "max_tokens"),
        (body_of(max_tokens="many"), "max_tokens"),
        (body_of(messages=[]), "messages"),
        (body_of(messages=["Hello!"]), "messages[0]"),
        (body_of(messages=[{"role": "user"}]), "messages[0].content"),
        (body_of("Hello!"), "messages[0].content[0]"),
        (body_of(result_of("Hello!")), "messages[0].content[0].content[0]"),
        (body_of(system=5), "system"),
        (body_of(stream="yes"), "stream"),
        (body_of(tools={}), "tools"),
        (body_of(tools=["go"]), "tools[0]"),
        (body_of(tools=[{"type": 5}]), "tools[0]"),
        *(
            (body_of(tools=[SCHEMA, {"type": kind, "name": "x"}]), "tools[1].type")
            for kind in (
                "web_search_20250305",
                "web_fetch_20250910",
                "code_execution_20250825",
                "mcp_toolset",
                "new_1",
                "",
            )
        ),
        (body_of(tool_choice="auto"), "tool_choice"),
        (body_of(thinking=True), "thinking"),
        (body_of(thinking={"type": "boundless"}), "thinking.type"),
        (body_of(thinking={"type": "enabled", "budget_tokens": -1}), "thinking.budget_tokens"),
        (body_of(thinking={"type": "enabled", "budget_tokens": True}), "thinking.budget_tokens"),
        (body_of(service_tier="priority"), "service_tier"),
        (body_of(output_config={"speed": "fast"}), "output_config.speed"),
        *(
            (body_of(**{name: {}}), name)
            for name in (
                "container",
                "mcp_servers",
                "context_management",
                "speed",
                "inference_geo",
                "fallbacks",
                "n_predict",
            )
        ),
        (body_of(cache_control={"type": "ephemeral", "ttl": "1h"}), "cache_control.ttl"),
        (body_of(system=[{**TEXT, "cache_control": {"ttl": "1h"}}]), "system[0].cache_control.ttl"),
        (body_of({**IMAGE, "cache_control": {"ttl": "1h"}}), "messages[0].content[0].cache_control.ttl"),
        (
            body_of(result_of({**TEXT, "cache_control": {"ttl": "1h"}})),
            "messages[0].content[0].content[0].cache_control.ttl",
        ),
        (body_of(tools=[{**SCHEMA, "cache_control": {"ttl": "1h"}}]), "tools[0].cache_control.ttl"),
        (
            body_of(result_of({"type": "search_result", "content": [{**TEXT, "cache_control": {"ttl": "1h"}}]})),
            "messages[0].content[0].content[0].content[0].cache_control.ttl",
        ),
        (
            body_of({"type": "document", "source": {"type": "content", "content": [{"cache_control": {"ttl": "1h"}}]}}),
            "messages[0].content[0].source.content[0].cache_control.ttl",
        ),
        (body_of(messages=[{"role": "user", "content": "x", "cache_control": 5}]), "cache_control"),
    ],
)
def test_what_cannot_be_priced_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        API.read(body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("thinking", "hides"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "between_tools"}, True),
        ({"type": "disabled"}, False),
        (None, False),
    ],
)
def test_thinking_is_shown_in_summary_only(thinking: Any, hides: bool) -> None:
    assert API.read(body_of(thinking=thinking)).hides_output == hides


def test_what_a_tool_was_called_with_may_look_like_anything() -> None:
    odd = {"cache_control": {"ttl": "1h"}, "deep": json.loads("[" * 50 + "]" * 50)}
    call = {"type": "tool_use", "id": "toolu_1", "name": "go", "input": odd}
    tool = {**SCHEMA, "input_schema": {"properties": odd}}
    assert API.read(body_of(call, tools=[tool])).input_bytes == 0


def test_blocks_that_are_nested_without_end_are_refused() -> None:
    nested: dict[str, Any] = TEXT
    for _ in range(MAX_BLOCK_DEPTH - 4):
        nested = result_of(nested)
    assert API.read(body_of(nested)).input_bytes == 0
    for _ in range(MAX_BLOCK_DEPTH):
        nested = result_of(nested)
    with pytest.raises(InvalidRequest, match="nested"):
        API.read(body_of(nested))


@pytest.mark.parametrize(
    ("asked", "most", "thinking", "forwarded"),
    [
        (8000, 8000, {"type": "enabled", "budget_tokens": 4000}, {"type": "enabled", "budget_tokens": 4000}),
        (8000, 6000, {"type": "enabled", "budget_tokens": 4000}, {"type": "enabled", "budget_tokens": 3000}),
        (8000, 1500, {"type": "enabled", "budget_tokens": 4000}, {"type": "enabled", "budget_tokens": 1024}),
        (8000, 1024, {"type": "enabled", "budget_tokens": 4000}, {"type": "disabled"}),
        (100, 50, {"type": "enabled", "budget_tokens": 60}, {"type": "disabled"}),
        (100, 80, {"type": "enabled", "budget_tokens": 60}, {"type": "enabled", "budget_tokens": 60}),
        (8000, 6000, {"type": "enabled", "budget_tokens": 9000}, {"type": "enabled", "budget_tokens": 9000}),
        (8000, 6000, {"type": "adaptive"}, {"type": "adaptive"}),
        (8000, 6000, None, None),
    ],
)
def test_a_lowered_limit_leaves_room_beside_thinking(asked: int, most: int, thinking: Any, forwarded: Any) -> None:
    ask = API.read(body_of(max_tokens=asked, thinking=thinking))
    written = API.written_anew(ask, Bound(10, 1, most), {"max_tokens": asked, "thinking": thinking}, UPSTREAM)
    assert written == {"max_tokens": most, **({} if forwarded is None else {"thinking": forwarded})}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (errors.bad_key(), "authentication_error"),
        (errors.unknown_model("x"), "not_found_error"),
        (errors.wrong_method("GET", "POST"), "invalid_request_error"),
        (errors.invalid_body(InvalidRequest("no", "x")), "invalid_request_error"),
        (errors.body_too_large(5), "request_too_large"),
        (errors.store_unavailable(), "api_error"),
        (errors.upstream_unavailable(), "api_error"),
        (errors.upstream_timeout(), "api_error"),
        (errors.upstream_auth(), "api_error"),
        (errors.internal_error(), "api_error"),
        (errors.upstream_error(400, {"message": "no", "type": "exceed_context_size_error"}), "invalid_request_error"),
        (errors.upstream_error(429, {}), "rate_limit_error"),
        (errors.upstream_error(529, {"message": "no", "type": "overloaded_error"}), "overloaded_error"),
    ],
)
def test_errors_have_the_type_that_anthropic_has_for_them(failure: Failure, kind: str) -> None:
    plain = json.loads(failure.body("req_1"))
    told = json.loads(failure.for_anthropic().body("req_1"))
    assert told == {**plain, "error": {**plain["error"], "type": kind}}
    assert (failure.for_anthropic().status, failure.for_anthropic().headers) == (failure.status, failure.headers)


def test_costs_are_written_without_an_exponent() -> None:
    out, _ = fed(WHOLE, cost=COST)
    assert b'"cost":0.000000007' in out
    assert Decimal("0.000000007") == Decimal(str(documents(out)[-2]["usage"]["cost"]))
