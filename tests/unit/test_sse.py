"""EventStream: what a client gets of a stream, and what the gateway learns from it, however the bytes were cut."""

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream import sse
from gateway.upstream.sse import BrokenStream, EventStream
from gateway.upstream.usage import Usage

DONE = b"data: [DONE]\n\n"
COST = {"cost": orjson.Fragment("0.000000007"), "credits": {"source": "payg"}}


def event(value: object, *, end: bytes = b"\n\n", field: bytes = b"data: ") -> bytes:
    return field + json.dumps(value, ensure_ascii=False).encode() + end


def words(text: str, finish: str | None = None, **members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **members}


def usage(prompt: int = 7, completion: int = 5) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def usage_only(prompt: int = 7, completion: int = 5, **members: Any) -> dict[str, Any]:
    return {"choices": [], "usage": usage(prompt, completion), **members}


def fed(
    stream: bytes | Iterable[bytes], *, show: bool = False, several: bool = False, cost: Any = None
) -> tuple[bytes, EventStream]:
    """Everything that the client of a stream gets, and the follower afterwards."""
    events = EventStream(show_usage=show, several_answers=several)
    chunks = [stream] if isinstance(stream, bytes) else stream
    return b"".join(events.feed(chunk) for chunk in chunks) + events.closing(cost), events


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted(cuts), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


_LINE_ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])
_SHOWN = st.one_of(
    st.text(max_size=20).map(words),
    st.text(max_size=5).map(lambda text: words(text, "stop", usage=usage())),
    st.integers(0, 9).map(lambda count: words("x", usage=usage(7, count))),
    st.just(words("x", usage=None)),
    st.just(words('", "usage": {"prompt_tokens": 1}, "choices": []')),
    st.sampled_from([None, 5, [], "text", {"usage": []}, {"usage": {}}, {"error": {"message": "broke"}}]),
)
_HIDDEN = st.builds(usage_only, st.integers(-1, 9), st.integers(-1, 9))
_OTHER = st.sampled_from([b": keep-alive", b"event: ping\nid: 7", b"data: {not json", b"data: \xff\xfe", b"retry: 5"])


@st.composite
def _streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A stream that ends in [DONE], and the same without its usage-only events."""
    end = draw(_LINE_ENDS)
    space = draw(st.sampled_from([b"data: ", b"data:"]))
    whole, shown = b"", b""
    for kind in draw(st.lists(st.sampled_from(["shown", "hidden", "other"]), max_size=8)):
        if kind == "hidden":
            whole += event(draw(_HIDDEN), end=end, field=space)
            continue
        text = draw(_OTHER) + end if kind == "other" else event(draw(_SHOWN), end=end, field=space)
        whole, shown = whole + text, shown + text
    return whole + space + b"[DONE]" + end, shown + space + b"[DONE]" + end


@given(_streams(), st.data(), st.booleans())
def test_however_a_stream_is_cut_the_client_gets_the_same(
    streams: tuple[bytes, bytes], data: st.DataObject, several: bool
) -> None:
    whole, shown = streams
    chunks = pieces(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    hidden, cut = fed(chunks, several=several)
    assert hidden == shown
    assert fed(chunks, show=True, several=several)[0] == whole
    once = fed(whole, several=several)[1]
    assert (cut.usage, cut.output_events, cut.done, cut.failed) == (
        once.usage,
        once.output_events,
        once.done,
        once.failed,
    )


@given(_streams(), st.data())
def test_however_a_stream_is_cut_the_cost_is_written_the_same(
    streams: tuple[bytes, bytes], data: st.DataObject
) -> None:
    whole = streams[0]
    chunks = pieces(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    assert fed(chunks, show=True, cost=COST)[0] == fed(whole, show=True, cost=COST)[0]


_FRAGMENTS = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [b"data: ", b"\n\n", b"\r\n", b"\r", b"[DONE]", b'{"usage": {', b'"prompt_tokens": 7', b"}", b'"choices": []']
        + [b'{"error": ', b"null", event(usage_only()), event(words("a")), b'data: {"choices": [], "usage": 5}\n\n']
    ),
)


@given(st.lists(_FRAGMENTS, max_size=20), st.booleans(), st.booleans())
def test_no_bytes_are_too_strange(chunks: list[bytes], show: bool, several: bool) -> None:
    out, _ = fed(chunks, show=show, several=several)
    assert len(out) <= sum(map(len, chunks))
    assert not show or b"".join(chunks).startswith(out)
    fed(chunks, show=show, several=several, cost=COST)


def test_each_event_is_handed_out_as_soon_as_it_is_whole() -> None:
    events = EventStream(show_usage=False, several_answers=False)
    first = event(words("a"))
    assert events.feed(first[:10]) == b""
    assert events.feed(first[10:] + b"data: {") == first
    assert not events.done


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_every_line_end_is_understood(end: bytes) -> None:
    stream = event(words("a"), end=end) + event(usage_only(), end=end) + b"data: [DONE]" + end
    out, events = fed(stream)
    assert out == event(words("a"), end=end) + b"data: [DONE]" + end
    assert events.usage == Usage(7, 5)
    assert events.done
    assert events.output_events == 1


def test_a_missing_space_after_the_field_changes_nothing() -> None:
    stream = b"".join(event(value, field=b"data:") for value in (words("a"), usage_only())) + b"data:[DONE]\n\n"
    out, events = fed(stream)
    assert out == event(words("a"), field=b"data:") + b"data:[DONE]\n\n"
    assert events.usage == Usage(7, 5)


def test_a_comment_is_passed_on() -> None:
    stream = b": keep-alive\n\n" + event(words("a")) + b": again\n\n" + DONE
    assert fed(stream)[0] == stream


def test_usage_null_in_every_chunk_is_no_usage() -> None:
    shown = event(words("a", usage=None)) + event(words("", "stop", usage=None))
    out, events = fed(shown + event(usage_only()) + DONE)
    assert out == shown + DONE
    assert events.usage == Usage(7, 5)


def test_usage_on_the_finish_chunk_is_passed_on_and_read() -> None:
    stream = event(words("a")) + event(words("", "stop", usage=usage())) + DONE
    out, events = fed(stream)
    assert out == stream
    assert events.usage == Usage(7, 5)


def test_of_cumulative_usage_the_last_counts_and_all_chunks_flow() -> None:
    chunks = [event(words("a", usage=usage(7, count))) for count in range(1, 6)]
    events = EventStream(show_usage=False, several_answers=False)
    assert [events.feed(chunk) for chunk in chunks] == chunks
    assert events.usage == Usage(7, 5)


def test_two_answers_with_a_usage_each_are_added_up() -> None:
    stream = event(usage_only(7, 5)) + event(words("b")) + event(usage_only(7, 4)) + DONE
    out, events = fed(stream, several=True)
    assert events.usage == Usage(7, 9)
    assert out == event(words("b")) + DONE


def test_of_two_usages_for_one_answer_the_last_counts() -> None:
    assert fed(event(usage_only(7, 5)) + event(usage_only(7, 4)) + DONE)[1].usage == Usage(7, 4)


def test_usage_within_a_text_is_no_usage() -> None:
    text = '"usage": {"prompt_tokens": 1, "completion_tokens": 1}, "choices": [], data: [DONE]'
    stream = event(words(text)) + event({"choices": [], "text": text}) + DONE
    out, events = fed(stream)
    assert out == stream
    assert events.usage is None


def test_an_event_of_a_megabyte_passes_in_small_chunks() -> None:
    big = event(words("x" * 2**20))
    stream = big + event(usage_only()) + DONE
    out, events = fed(pieces(stream, range(0, len(stream), 65_536)))
    assert out == big + DONE
    assert events.usage == Usage(7, 5)
    assert events.output_events == 1


def test_an_event_without_end_breaks_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    events = EventStream(show_usage=False, several_answers=False)
    assert events.feed(b"data: " + b"x" * 94) == b""
    with pytest.raises(BrokenStream, match="100 bytes"):
        events.feed(b"x")


def test_what_follows_done_is_dropped() -> None:
    out, events = fed([event(words("a")) + DONE + event(words("b")), event(usage_only(1, 1)), b"trailing"])
    assert out == event(words("a")) + DONE
    assert events.usage is None
    assert events.output_events == 1


def test_llamas_null_is_passed_on() -> None:
    stream = event(None) + event(words("a")) + DONE
    assert fed(stream)[0] == stream


@pytest.mark.parametrize(
    "value",
    [{"error": {"message": "broke"}}, {"object": "error", "message": "broke"}, {"id": "x", "error": {"message": "b"}}],
    ids=["error first", "flat", "error later"],
)
def test_an_error_event_is_noticed_and_passed_on(value: dict[str, Any]) -> None:
    stream = event(words("a")) + event(value)
    out, events = fed(stream)
    assert out == stream
    assert events.failed


@pytest.mark.parametrize(
    "value",
    [words('"error": {"error"'), words("a", error=None), {"error": None, **words("a")}],
    ids=["in a text", "null", "null first"],
)
def test_what_only_looks_like_an_error_is_none(value: dict[str, Any]) -> None:
    assert not fed(event(value) + DONE)[1].failed


def test_the_cost_is_written_into_the_last_usage_for_who_asked() -> None:
    last = usage_only(7, 5, id="c1", service_tier=None)
    out, _ = fed(event(words("a")) + event(last) + DONE, show=True, cost=COST)
    assert out.startswith(event(words("a")))
    assert out.endswith(DONE)
    written = json.loads(out.removeprefix(event(words("a"))).removesuffix(DONE).removeprefix(b"data: "))
    assert Decimal(str(written["usage"].pop("cost"))) == Decimal("0.000000007")
    assert written["usage"].pop("credits") == {"source": "payg"}
    assert written == last


def test_the_cost_is_written_only_once() -> None:
    stream = event(usage_only(7, 3)) + event(words("a", "stop", usage=usage(7, 4))) + event(usage_only(7, 5)) + DONE
    out, _ = fed(stream, show=True, cost=COST)
    assert out.count(b'"credits"') == 1
    assert out.startswith(event(usage_only(7, 3)) + event(words("a", "stop", usage=usage(7, 4))))


@pytest.mark.parametrize("between", [b": keep-alive\n\n", b"\n"], ids=["comment", "blank line"])
def test_what_is_no_event_does_not_part_the_usage_from_the_end(between: bytes) -> None:
    chunks = [event(usage_only()), between, DONE]
    assert b'"credits"' in fed(chunks, show=True, cost=COST)[0]


def test_who_did_not_ask_never_sees_the_cost() -> None:
    stream = event(words("a")) + event(words("", "stop", usage=usage())) + DONE
    assert fed(stream, cost=COST)[0] == stream
    assert fed(event(usage_only()) + DONE, cost=COST)[0] == DONE


def test_without_a_cost_the_usage_is_passed_on_as_it_came() -> None:
    stream = event(usage_only()) + DONE
    assert fed(stream, show=True)[0] == stream


def test_a_usage_that_makes_no_sense_is_hidden_but_not_taken() -> None:
    out, events = fed(event(usage_only(-7, 5)) + DONE)
    assert out == DONE
    assert events.usage is None


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "a"},
        # vLLM repeats the text under its old name.
        {"reasoning": "a", "reasoning_content": "a"},
        {"reasoning": "a", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ],
    ids=["content", "reasoning", "both names", "with details", "tool call"],
)
def test_an_event_with_output_counts_once(delta: dict[str, Any]) -> None:
    stream = event({"choices": [{"index": 0, "delta": delta}]}) * 3 + event(words("")) + event(words("a", None))
    assert fed(stream)[1].output_events == 4


def test_an_event_nested_deeper_than_can_be_written_still_passes() -> None:
    nested = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "x": ' + b"[" * 300 + b"]" * 300 + b"}}\n\n"
    out, events = fed(nested + DONE, show=True, cost=COST)
    assert events.usage == Usage(7, 0)
    assert out.endswith(DONE)
