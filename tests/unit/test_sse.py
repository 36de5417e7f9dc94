"""EventStream: what a client gets of a stream, and what the gateway learns from it, however the bytes were cut."""

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.chat_stream import ChatStream, ChoicesStream, TextStream
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound, Operation
from gateway.upstream import sse
from gateway.upstream.sse import BrokenStream, Overrun
from gateway.upstream.usage import Usage
from tests.unit.figures import used

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


def stream_of(
    *, show: bool = False, answers: int = 1, operation: Operation = "chat", output_tokens: int = 1000
) -> ChoicesStream:
    """show: whether the client asked for usage. The input is estimated as 10 tokens."""
    ask = Ask(operation, "m", input_bytes=40, completions=answers, stream=True, wants_usage=show)
    return (ChatStream if operation == "chat" else TextStream)(ask, Bound(1000, answers, output_tokens))


def fed(
    stream: bytes | Iterable[bytes], *, show: bool = False, answers: int = 1, cost: Any = None
) -> tuple[bytes, ChoicesStream]:
    """Everything that the client of a stream gets, and the follower afterwards."""
    events = stream_of(show=show, answers=answers)
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


EMPTY_USAGE = b', "usage": null'


@st.composite
def _streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A stream that ends in [DONE], and the same without what tells of usage to those who asked for it."""
    end = draw(_LINE_ENDS)
    space = draw(st.sampled_from([b"data: ", b"data:"]))
    whole, shown = b"", b""
    for kind in draw(st.lists(st.sampled_from(["shown", "hidden", "other"]), max_size=8)):
        if kind == "hidden":
            whole += event(draw(_HIDDEN), end=end, field=space)
            continue
        text = draw(_OTHER) + end if kind == "other" else event(draw(_SHOWN), end=end, field=space)
        whole, shown = whole + text, shown + text.replace(EMPTY_USAGE, b"")
    return whole + space + b"[DONE]" + end, shown + space + b"[DONE]" + end


@given(_streams(), st.data(), st.booleans())
def test_however_a_stream_is_cut_the_client_gets_the_same(
    streams: tuple[bytes, bytes], data: st.DataObject, several: bool
) -> None:
    whole, shown = streams
    chunks = pieces(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    answers = 2 if several else 1
    hidden, cut = fed(chunks, answers=answers)
    assert hidden == shown
    assert fed(chunks, show=True, answers=answers)[0] == whole
    once = fed(whole, answers=answers)[1]
    assert (cut.usage, cut.done, cut.failed) == (once.usage, once.done, once.failed)
    for complete in (False, True):
        assert cut.metered(complete=complete) == once.metered(complete=complete)


@given(_streams(), st.data())
def test_however_a_stream_is_cut_the_cost_is_written_the_same(
    streams: tuple[bytes, bytes], data: st.DataObject
) -> None:
    whole = streams[0]
    chunks = pieces(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=30)))
    assert fed(chunks, show=True, cost=COST)[0] == fed(whole, show=True, cost=COST)[0]


_FRAGMENTS = st.binary(max_size=8) | st.sampled_from(
    [
        *(b"data: ", b"\n\n", b"\r\n", b"\r", b"}", b"null", b"[DONE]", b'{"error": ', b'{"usage": {'),
        *(b'"prompt_tokens": 7', b'"choices": []', b'data: {"choices": [], "usage": 5}\n\n'),
        *(event(usage_only()), event(words("a"))),
    ]
)


@given(st.lists(_FRAGMENTS, max_size=20), st.booleans(), st.booleans())
def test_no_bytes_are_too_strange(chunks: list[bytes], show: bool, several: bool) -> None:
    answers = 2 if several else 1
    out, _ = fed(chunks, show=show, answers=answers)
    assert len(out) <= sum(map(len, chunks))
    assert not show or b"".join(chunks).startswith(out)
    fed(chunks, show=show, answers=answers, cost=COST)


def test_each_event_is_handed_out_as_soon_as_it_is_whole() -> None:
    events = stream_of()
    first = event(words("a"))
    assert events.feed(first[:10]) == b""
    assert events.feed(first[10:] + b"data: {") == first
    assert not events.done


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_every_line_end_is_understood(end: bytes) -> None:
    stream = event(words("a"), end=end) + event(usage_only(), end=end) + b"data: [DONE]" + end
    out, events = fed(stream)
    assert out == event(words("a"), end=end) + b"data: [DONE]" + end
    assert events.metered(complete=True) == used(7, 5)
    assert events.done


def test_a_missing_space_after_the_field_changes_nothing() -> None:
    stream = b"".join(event(value, field=b"data:") for value in (words("a"), usage_only())) + b"data:[DONE]\n\n"
    out, events = fed(stream)
    assert out == event(words("a"), field=b"data:") + b"data:[DONE]\n\n"
    assert events.usage == Usage(7, 5)


def test_a_comment_is_passed_on() -> None:
    stream = b": keep-alive\n\n" + event(words("a")) + b": again\n\n" + DONE
    assert fed(stream)[0] == stream


def test_usage_null_in_every_chunk_is_no_usage_and_only_for_those_who_asked() -> None:
    told = event(words("a", usage=None)) + event(words("", "stop", usage=None))
    out, events = fed(told + event(usage_only()) + DONE)
    assert out == event(words("a")) + event(words("", "stop")) + DONE
    assert events.usage == Usage(7, 5)
    stream = told + event(usage_only()) + DONE
    assert fed(stream, show=True)[0] == stream
    said = event(words(', "usage": null}'))
    assert fed(said + DONE)[0] == said + DONE


def test_usage_on_the_finish_chunk_is_passed_on_and_read() -> None:
    stream = event(words("a")) + event(words("", "stop", usage=usage())) + DONE
    out, events = fed(stream)
    assert out == stream
    assert events.usage == Usage(7, 5)


def test_of_cumulative_usage_the_last_counts_and_all_chunks_flow() -> None:
    chunks = [event(words("a", usage=usage(7, count))) for count in range(1, 6)]
    events = stream_of()
    assert [events.feed(chunk) for chunk in chunks] == chunks
    assert events.usage == Usage(7, 5)


def test_two_answers_with_a_usage_each_are_added_up() -> None:
    stream = event(usage_only(7, 5)) + event(words("b")) + event(usage_only(7, 4)) + DONE
    out, events = fed(stream, answers=2)
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
    assert events.metered(complete=True) == used(7, 5)


def test_an_event_without_end_breaks_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    events = stream_of()
    assert events.feed(b"data: " + b"x" * 94) == b""
    with pytest.raises(BrokenStream, match="100 bytes"):
        events.feed(b"x")


def test_what_follows_done_is_dropped() -> None:
    out, events = fed([event(words("a")) + DONE + event(words("b")), event(usage_only(1, 1)), b"trailing"])
    assert out == event(words("a")) + DONE
    assert events.metered(complete=True) == used(10, 1)


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
    assert fed(stream)[1].metered(complete=False) == used(10, 4)


def test_an_event_nested_deeper_than_can_be_written_still_passes() -> None:
    deep = b'{"prompt_tokens": 7, "completion_tokens": 5, "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    nested = b'data: {"choices": [], "usage": ' + deep + b"}\n\n"
    out, events = fed(nested + DONE, show=True, cost=COST)
    assert events.usage == Usage(7, 5)
    assert out == nested + DONE


# --- what is charged -------------------------------------------------------------------------------------------------


def test_a_complete_stream_is_charged_by_its_usage() -> None:
    stream = event(words("a long text in one event")) + event(usage_only(7, 5)) + DONE
    assert fed(stream)[1].metered(complete=True) == used(7, 5)


def test_without_a_usage_events_or_four_bytes_of_text_are_a_token() -> None:
    assert fed(event(words("a")) * 3 + DONE)[1].metered(complete=True) == used(10, 3)
    assert fed(event(words("x" * 41)) + DONE)[1].metered(complete=True) == used(10, 11)


def test_who_leaves_pays_for_the_text_behind_the_last_usage_too() -> None:
    stream = event(words("a", usage=usage(7, 1))) + event(words("b")) * 3
    assert fed(stream)[1].metered(complete=False) == used(7, 4)


def test_of_several_answers_each_event_is_a_token_at_least() -> None:
    stream = event(words("a")) * 6 + event(words("", "stop", usage=usage(7, 3))) + DONE
    assert fed(stream, answers=2)[1].metered(complete=True) == used(7, 6)
    assert fed(stream)[1].metered(complete=True) == used(7, 3)


def test_nothing_handed_out_is_nothing_to_pay() -> None:
    assert fed(event(words("")) + DONE)[1].metered(complete=True) == Metered()
    assert fed(event(words("")) + event(usage_only(7, 1)) + DONE)[1].metered(complete=True) == Metered()
    assert not fed(event(words("")))[1].has_output


def test_reasoning_that_is_not_shown_is_paid() -> None:
    hidden = {**usage(7, 500), "completion_tokens_details": {"reasoning_tokens": 500}}
    stream = event(words("")) + event({"choices": [], "usage": hidden}) + DONE
    assert fed(stream)[1].metered(complete=True) == used(7, 500, reasoning=500)


@given(_streams(), st.booleans(), st.booleans())
def test_no_stream_is_charged_beyond_the_bound(streams: tuple[bytes, bytes], several: bool, complete: bool) -> None:
    events = stream_of(answers=2 if several else 1, output_tokens=3)
    events.feed(streams[0])
    tokens = events.metered(complete=complete)
    assert 0 <= tokens.cache_read <= tokens.input <= 1000
    assert 0 <= tokens.output <= (6 if several else 3)


def test_an_upstream_that_does_not_stop_is_stopped() -> None:
    events = stream_of(output_tokens=1)
    with pytest.raises(Overrun):
        for _ in range(1000):
            events.feed(event(words("a")))
    assert events.metered(complete=False) == used(10, 1)


def test_what_is_paid_was_handed_out_before_the_stream_is_cut() -> None:
    events = stream_of(output_tokens=1)
    burst = event(words("a")) * 1000
    assert events.feed(burst) == burst
    with pytest.raises(Overrun):
        events.feed(event(words("b")))
    assert events.metered(complete=False).output == 1


def test_a_little_more_than_was_asked_for_passes() -> None:
    # Events are not quite tokens: servers split words and repeat names of tools.
    events = stream_of(output_tokens=10)
    for _ in range(20):
        events.feed(event(words("a")))
    assert events.metered(complete=False) == used(10, 10)


@pytest.mark.parametrize("text", ["text", "content"])
def test_a_text_completion_has_its_output_elsewhere(text: str) -> None:
    events = stream_of(operation="text_completion")
    events.feed(event({"choices": [{"index": 0, text: "a", "finish_reason": None}]}) * 3)
    assert events.has_output == (text == "text")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_last_event_needs_no_blank_line(end: bytes) -> None:
    events = stream_of()
    assert events.feed(event(words("a")) + b"data: [DONE]" + end) == event(words("a"))
    assert not events.done
    assert events.end() == b""
    assert events.done
    assert events.closing(None) == b"data: [DONE]" + end


def test_an_answer_in_one_event_with_its_usage_is_paid() -> None:
    document = {
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "All of it"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    events = stream_of()
    assert events.feed(event(document) + b"data: [DONE]\n\n") == b""
    assert events.metered(complete=True) == used(3, 2)
    assert events.closing(None).startswith(event(document)[:20])


def test_half_an_event_at_the_end_is_not_passed_on() -> None:
    events = stream_of()
    whole = event(words("a"))
    assert events.feed(whole + b'data: {"choices": [{"delta": {"content": "b') == whole
    assert events.end() == b""
    assert not events.done


def test_a_whole_event_at_the_end_is_closed_before_an_error_follows() -> None:
    events = stream_of()
    assert events.feed(event(words("a")).rstrip()) == b""
    assert events.end() == event(words("a"))


# --- what is covered -------------------------------------------------------------------------------------------------


def chunks_of(*texts: str) -> list[bytes]:
    return [event(words(text)) for text in texts]


def test_output_that_is_not_covered_waits() -> None:
    events, (one, two, three) = stream_of(), chunks_of("a", "b", "c")
    assert events.feed(one + two + three, covered=2) == one + two
    assert (events.counted, events.waiting, events.wanted) == (2, True, 3)
    assert events.release(2) == b""
    assert events.release(3) == three
    assert (events.counted, events.waiting, events.wanted) == (3, False, 3)


def test_what_waits_is_not_charged() -> None:
    events = stream_of()
    events.feed(b"".join(chunks_of("a", "b", "c")) + event(usage_only(7, 3)) + DONE, covered=1)
    assert events.metered(complete=False) == used(10, 1)
    assert not events.done
    assert events.usage is None


def test_the_end_waits_behind_output_that_waits() -> None:
    events, (one, two) = stream_of(), chunks_of("a", "b")
    assert events.feed(one + two + DONE, covered=1) == one
    assert events.release(2) == two
    assert events.done
    assert events.closing(None) == DONE


def test_an_event_without_output_needs_no_cover() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    finish = event(words("", "stop"))
    assert stream_of().feed(role + finish, covered=0) == role + finish


def test_a_last_event_without_blank_line_waits_too() -> None:
    events = stream_of()
    last = event(words("a"))
    assert events.feed(last.rstrip()) == b""
    assert events.end(covered=0) == b""
    assert events.release(1) == last


@given(_streams(), st.data())
def test_however_little_is_covered_at_a_time_the_client_gets_the_same(
    streams: tuple[bytes, bytes], data: st.DataObject
) -> None:
    whole, shown = streams
    events, out, covered = stream_of(), b"", 0
    for chunk in pieces(whole, data.draw(st.lists(st.integers(0, len(whole)), max_size=10))):
        out += events.feed(chunk, covered)
        while events.waiting:
            assert events.counted <= covered < events.wanted
            covered = events.wanted
            out += events.release(covered)
    assert out + events.closing(None) == shown
    assert events.metered(complete=True) == fed(whole)[1].metered(complete=True)


# --- how output is counted -------------------------------------------------------------------------------------------


def counted(rule: CountOutput, *values: Any, answers: int = 1) -> int:
    events = ChatStream(Ask("chat", "m", 40, completions=answers, stream=True), Bound(1000, answers, 1000), rule)
    events.feed(b"".join(event(value) for value in values))
    return events.counted


@pytest.mark.parametrize("text", ["abcdefgh", "üüüü", '"""\n\n\\\\\t', "\u0001\u0002345678"])
def test_escapes_count_as_what_they_stand_for(text: str) -> None:
    assert len(text.encode()) == 8
    for value in (json.dumps(words(text)), json.dumps(words(text), ensure_ascii=False)):
        for rule, tokens in (("chunks", 2), ("bytes", 8)):
            events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(1000, 1, 1000), rule)  # type: ignore[arg-type]
            events.feed(b"data: " + value.encode() + b"\n\n")
            assert events.counted == tokens


def test_by_bytes_no_text_counts_too_little() -> None:
    assert counted("bytes", words("abc"), words("de")) == 5
    events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(1000, 1, 1000), "bytes")
    events.feed(b"".join(chunks_of("abcd", "efgh")))
    assert events.metered(complete=False).output == 2  # but no customer pays a token per byte


def test_by_usage_the_last_report_and_what_came_since_count() -> None:
    assert counted("usage", words("a"), words("b", usage=usage(7, 50)), words("c"), words("d")) == 52
    assert counted("usage", words("a long text of some words", usage=usage(7, 1))) == 1
    assert counted("usage", words("a"), words("b", usage=usage(7, 10**9))) == 1000


def test_by_usage_an_event_is_covered_only_if_its_own_report_is() -> None:
    events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(1000, 1, 1000), "usage")
    assert events.feed(event(words("a", usage=usage(7, 9))), covered=8) == b""
    assert events.wanted == 9


def test_by_usage_several_answers_count_by_chunks() -> None:
    assert counted("usage", words("a", usage=usage(7, 50)), words("b", usage=usage(7, 50)), answers=2) == 2


def test_a_running_usage_is_charged_exactly_when_the_stream_ends_early() -> None:
    events = ChatStream(Ask("chat", "m", 40, stream=True), Bound(1000, 1, 1000), "usage")
    events.feed(event(words("a text of more than four bytes", usage=usage(7, 3))) + event(words("b")))
    assert events.metered(complete=False) == used(7, 4)


@pytest.mark.parametrize("show", [False, True])
def test_running_usage_is_not_shown_to_who_did_not_ask(show: bool) -> None:
    ask = Ask("chat", "m", 40, stream=True, wants_usage=show)
    events = ChatStream(ask, Bound(1000, 1, 1000), "usage")
    chunks = (words("a", usage=usage(7, 1)), words("", "stop", usage=usage(7, 1)), usage_only(7, 1))
    out = events.feed(b"".join(event(chunk) for chunk in chunks) + DONE) + events.closing(None)
    shown = [orjson.loads(line[6:]) for line in out.splitlines() if line.startswith(b"data: {")]
    assert [bool(chunk.get("usage")) for chunk in shown] == ([False, False, True] if show else [False, False])
    assert events.metered(complete=True) == used(7, 1)


def test_running_usage_is_shown_to_who_asked() -> None:
    ask = Ask("chat", "m", 40, stream=True, wants_usage=True, wants_running_usage=True)
    events = ChatStream(ask, Bound(1000, 1, 1000), "usage")
    stream = (
        event(words("a", usage=usage(7, 1))) + event(words("", "stop", usage=usage(7, 1))) + event(usage_only(7, 1))
    )
    assert events.feed(stream + DONE) + events.closing(None) == stream + DONE


# --- cut short -------------------------------------------------------------------------------------------------------

QUOTA = {"ended_by": "credits", "code": "insufficient_quota"}
FRAME = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "upstream-m"}


def closing_of(events: ChoicesStream, cost: Any = None) -> list[Any]:
    *values, done = events.closing(cost).split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    return [json.loads(value.removeprefix(b"data: ")) for value in values]


def test_a_stream_cut_short_ends_as_if_at_its_limit_and_says_why() -> None:
    events = stream_of()
    events.feed(event({**FRAME, **words("a")}) + event({**FRAME, **words("b")}), covered=1)
    events.cut_short(QUOTA)
    assert events.done
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert closing_of(events) == [{**FRAME, "choices": [choice], "quota": QUOTA}]
    assert events.metered(complete=False) == used(10, 1)


def test_of_several_answers_only_those_still_open_are_ended() -> None:
    events = stream_of(answers=3)
    events.feed(event(words("a")) + event({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}))
    events.cut_short(QUOTA)
    assert [value["choices"][0]["index"] for value in closing_of(events)] == [0, 2]


def test_a_text_completion_is_ended_in_its_own_shape() -> None:
    events = stream_of(operation="text_completion")
    events.feed(event({"object": "text_completion", "choices": [{"index": 0, "text": "a", "finish_reason": None}]}))
    events.cut_short(QUOTA)
    (value,) = closing_of(events)
    assert value["object"] == "text_completion"
    assert value["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def test_who_asked_gets_the_usage_that_is_charged_and_its_cost() -> None:
    events = stream_of(show=True)
    events.feed(event(words("a")) * 3)
    events.cut_short(QUOTA)
    *_, last = closing_of(events, COST)
    assert last["choices"] == []
    assert [last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [10, 3, 13]
    assert last["usage"]["credits"] == {"source": "payg"}


def test_a_finish_that_was_held_back_is_not_lost() -> None:
    events = stream_of(answers=2)
    finish = event(words("", "stop", usage=usage()))
    assert events.feed(finish + event({"choices": [{"index": 1, "delta": {"content": "b"}}]}), covered=0) == b""
    events.cut_short(QUOTA)
    first, second = closing_of(events)
    assert event(first) == finish
    assert second["choices"][0]["index"] == 1


def test_a_stream_whose_name_is_hard_to_write_can_be_cut_short() -> None:
    events = stream_of()
    events.feed(event({**words("a"), "id": "x"}).replace(b'"x"', b'"\\ud83d"'))
    events.cut_short(QUOTA)
    assert closing_of(events)[0]["choices"][0]["finish_reason"] == "length"


def test_a_stream_of_nothing_can_be_cut_short() -> None:
    events = stream_of()
    events.feed(b'data: {"content": "no chunk"}\n\n', covered=0)
    events.cut_short(QUOTA)
    assert closing_of(events)[0]["choices"][0]["finish_reason"] == "length"
    assert events.metered(complete=False) == Metered()
