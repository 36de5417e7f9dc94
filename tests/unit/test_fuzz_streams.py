"""Streams of any shape from an upstream, of every endpoint that streams: nothing escapes, nothing is lost or invented,
and nothing that is handed out is free or beyond what is held for it."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import strategies as st

from gateway.apis.api import Api
from gateway.apis.registry import APIS
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import UNLIMITED, BrokenStream, EventStream, Overrun
from tests.unit.fuzzing import FEW_OR_MANY, JSON, Json, fuzz, tampered

CHAT, TEXT, RESPONSES, MESSAGES = "/chat/completions", "/completions", "/responses", "/messages"
INPUT_TOKENS, OUTPUT_TOKENS = 500, 400
ERROR = orjson.dumps({"type": "error", "error": {"message": "x", "type": "api_error", "code": "c", "param": None}})
QUOTA = {"reason": "credits_exhausted"}
COST = {"cost": orjson.Fragment("0.000000007"), "credits": {"source": "payg"}}
RULES: list[CountOutput] = ["chunks", "bytes", "usage", "maximum"]


def choice(delta: Json, finish: str | None = None, index: int = 0) -> Json:
    return {"choices": [{"index": index, **delta, "finish_reason": finish}]}


def item(**fields: Json) -> Json:
    return {"type": "message", "id": "i", "role": "assistant", "content": [], **fields}


def response(**fields: Json) -> Json:
    return {"id": "r", "object": "response", "status": "completed", "output": [], **fields}


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
USED = {"input_tokens": 7, "output_tokens": 5}
PART = {"type": "output_text", "text": "", "annotations": []}
WHERE = {"item_id": "i", "output_index": 0, "content_index": 0}
#: Events as servers write them, by endpoint; those of the first list say something.
SAYING: dict[str, list[Json]] = {
    CHAT: [
        choice({"delta": {"content": "Hello"}}),
        choice({"delta": {"content": "é\n\u2028"}}, index=1),
        choice({"delta": {"reasoning_content": "hm"}}),
        choice({"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}]}}),
        {**choice({"delta": {"content": "x"}}), "usage": USAGE},
    ],
    TEXT: [choice({"text": "Hello"}), choice({"text": '"usage": {'}, "stop"), choice({"text": "x"}, index=1)],
    MESSAGES: [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a'}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "name": "f", "input": {}}},
    ],
    RESPONSES: [
        {"type": "response.output_text.delta", **WHERE, "delta": "Hello"},
        {"type": "response.refusal.delta", **WHERE, "delta": "no"},
        {"type": "response.function_call_arguments.delta", "item_id": "j", "output_index": 1, "delta": '{"a'},
        {"type": "response.reasoning_summary_text.delta", "item_id": "k", "output_index": 2, "delta": "hm"},
        {"type": "response.output_item.done", "output_index": 3, "item": item(content=[{**PART, "text": "all"}])},
    ],
}
OTHERS: dict[str, list[Json]] = {
    CHAT: [
        choice({"delta": {"role": "assistant"}}),
        choice({"delta": {}}, "stop"),
        {"choices": [], "usage": USAGE},
        {"choices": [], "usage": {**USAGE, "completion_tokens": 10**12}},
        {"error": {"message": "broke"}},
    ],
    TEXT: [choice({"text": ""}, "length"), {"choices": [], "usage": USAGE}],
    MESSAGES: [
        {"type": "message_start", "message": {"type": "message", "content": [], "usage": USED}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_stop", "index": 0},
        {"type": "ping"},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
        {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
    ],
    RESPONSES: [
        {"type": "response.created", "sequence_number": 0, "response": response(status="in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": item()},
        {"type": "response.content_part.added", **WHERE, "part": PART},
        {"type": "response.output_text.done", **WHERE, "text": "Hello"},
        {"type": "response.failed", "response": response(status="failed", error={"code": "c", "message": "m"})},
    ],
}
LAST: dict[str, list[bytes]] = {
    CHAT: [b"data: [DONE]"],
    TEXT: [b"data:[DONE]"],
    MESSAGES: [b'event: message_stop\ndata: {"type": "message_stop"}'],
    RESPONSES: [
        b"data: " + json.dumps({"type": kind, "response": response(usage=usage, output=output)}).encode()
        for kind in ("response.completed", "response.incomplete")
        for usage in (None, USED, {"input_tokens": -1, "output_tokens": "x"})
        for output in ([], [item(content=[{**PART, "text": "Hello, all of you!"}])])
    ],
}
ODD = [
    *(b": a comment", b"event: ping", b"id: 7\nretry: 5", b"id: \0", b"data", b"data:", b"data: null", b"data: []"),
    *(b"data: {not json", b"data: \xff\xfe", b"\xef\xbb\xbfdata: {}", b'data: {"choices":\ndata: []}', b"\0", b"x"),
    *(b'data: {"type": "error"}', b"event: error\ndata: {}", b'data: {"usage": {"prompt_tokens": 1e400}}'),
    b'data: {"delta": "' + rb"\ud83d" + b'", "type": "response.output_text.delta"}',
]
NAMES = tuple(
    "type index choices delta content text usage error object item output output_index response finish_reason item_id "
    "part content_index sequence_number message content_block input_tokens output_tokens completion_tokens".split()
)


@dataclass(frozen=True)
class Told:
    """A stream's events, without what parts them, and what parts them."""

    events: list[bytes]
    end: bytes

    @property
    def whole(self) -> bytes:
        return b"".join(event.replace(b"\n", self.end[: len(self.end) // 2]) + self.end for event in self.events)


def streams(path: str, *, tamper: bool = True) -> st.SearchStrategy[Told]:
    """Events of the endpoint, some of them changed; most streams come to their end."""
    known = st.sampled_from([*SAYING[path], *OTHERS[path]])
    written = (tampered(known, NAMES, most=2) if tamper else st.sampled_from(SAYING[path])).map(_event)
    middle = st.lists(st.one_of(written, written, st.sampled_from(ODD)) if tamper else written, max_size=12)
    ends = st.sampled_from([[event] for event in LAST[path]] * 3 + [[]])
    return st.builds(
        lambda events, last, end: Told([*events, *last], end),
        middle,
        ends,
        st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]),
    )


def _event(document: Json) -> bytes:
    name = document.get("type") if isinstance(document, dict) else None
    head = b"event: " + name.encode() + b"\n" if isinstance(name, str) and name.isidentifier() else b""
    return head + b"data: " + json.dumps(document, ensure_ascii=False).encode(errors="replace")


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size), max_size=12)


def pieces(stream: bytes, places: Iterable[int]) -> list[bytes]:
    ends = [*sorted(places), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@st.composite
def askings(draw: st.DrawFn) -> tuple[Ask, Bound, CountOutput]:
    answers = draw(st.sampled_from([1, 1, 2]))
    ask = Ask(
        "chat", "m", 2000, completions=answers, stream=True,
        wants_usage=draw(st.booleans()), wants_running_usage=draw(st.booleans()),
    )  # fmt: skip
    return ask, Bound(INPUT_TOKENS, answers, OUTPUT_TOKENS), draw(st.sampled_from(RULES))


def api_of(path: str) -> Api:
    return APIS[path]


def follow(events: EventStream, chunks: Iterable[bytes], covered: Callable[[], int] = lambda: UNLIMITED) -> bytes:
    """What the client is handed of a stream, up to its end or to where it breaks. Whatever waits is let go."""
    out = b""
    try:
        for chunk in chunks:
            out += events.feed(chunk, covered())
            while events.waiting:
                out += events.release(max(covered(), events.wanted))
            if events.done:
                return out
        out += events.end(covered())
        while events.waiting:
            out += events.release(max(covered(), events.wanted))
    except (BrokenStream, Overrun):
        pass
    return out


def within(metered: Metered, bound: Bound) -> bool:
    most = bound.metered(bound.output_tokens_each)
    parts = (metered.plain_input, metered.plain_output, *metered.figures().values())
    return metered.input <= most.input and metered.output <= most.output and all(part >= 0 for part in parts)


PATHS = pytest.mark.parametrize("path", SAYING)


@FEW_OR_MANY
@PATHS
def test_no_stream_is_too_strange(path: str, examples: int) -> None:
    @fuzz(examples, askings(), streams(path), st.data())
    def check(asking: tuple[Ask, Bound, CountOutput], told: Told, data: st.DataObject) -> None:
        whole = told.whole
        if data.draw(st.booleans(), "broken"):
            place = data.draw(st.integers(0, len(whole)))
            whole = whole[:place] + data.draw(st.binary(max_size=4)) + whole[place + data.draw(st.integers(0, 40)) :]
        events = api_of(path).stream(*asking)
        follow(events, pieces(whole, data.draw(cuts(len(whole)))))
        for complete in (False, True):
            assert within(events.metered(complete=complete), asking[1])
        assert events.error_event(ERROR).endswith(b"\n\n")
        if not events.done and data.draw(st.booleans(), "cut short"):
            events.cut_short(QUOTA)
            assert events.done
        assert bool(events.closing(data.draw(st.sampled_from([None, COST])))) >= events.done - events.failed


@FEW_OR_MANY
@PATHS
def test_however_a_stream_is_cut_it_is_the_same(path: str, examples: int) -> None:
    @fuzz(examples, askings(), streams(path), st.data())
    def check(asking: tuple[Ask, Bound, CountOutput], told: Told, data: st.DataObject) -> None:
        whole = told.whole
        chunks = pieces(whole, data.draw(cuts(len(whole))))
        once, cut = api_of(path).stream(*asking), api_of(path).stream(*asking)
        by_byte = api_of(path).stream(*asking)
        out = [
            follow(once, [whole]) + once.closing(None),
            follow(cut, chunks) + cut.closing(None),
            follow(by_byte, [whole[place : place + 1] for place in range(len(whole))]) + by_byte.closing(None),
        ]
        assert out[0] == out[1] == out[2]
        for other in (cut, by_byte):
            assert (once.usage, once.done, once.failed) == (other.usage, other.done, other.failed)
            for complete in (False, True):
                assert once.metered(complete=complete) == other.metered(complete=complete)


@FEW_OR_MANY
@PATHS
def test_what_is_handed_out_is_what_came(path: str, examples: int) -> None:
    """Byte for byte, for who asked for usage and is told no cost; only a stray end mark is kept from a response."""

    @fuzz(examples, streams(path), st.data())
    def check(told: Told, data: st.DataObject) -> None:
        ask, bound = Ask("chat", "m", 2000, stream=True, wants_usage=True), Bound(INPUT_TOKENS, 1, OUTPUT_TOKENS)
        events = api_of(path).stream(ask, bound, "chunks")
        whole = told.whole
        out = follow(events, pieces(whole, data.draw(cuts(len(whole))))) + events.closing(None)
        if path == RESPONSES and events.done:
            out, whole = out.replace(b"\r", b"\n").rstrip(b"\n"), whole.replace(b"\r", b"\n").rstrip(b"\n")
        assert whole.startswith(out)
        if not events.done:
            assert out == whole


@FEW_OR_MANY
@PATHS
@pytest.mark.parametrize("rule", ["chunks", "bytes"])
def test_nothing_is_handed_out_beyond_what_is_covered(path: str, rule: CountOutput, examples: int) -> None:
    """What the client has at any moment, followed by itself, shows no more output than was covered then."""
    ask, bound = Ask("chat", "m", 2000, stream=True, wants_usage=True), Bound(INPUT_TOKENS, 1, OUTPUT_TOKENS)

    @fuzz(examples, streams(path), st.data(), st.lists(st.integers(0, 30), min_size=1, max_size=8).map(sorted))
    def check(told: Told, data: st.DataObject, covers: list[int]) -> None:
        events, whole = api_of(path).stream(ask, bound, rule), told.whole
        out = b""
        for number, chunk in enumerate(pieces(whole, data.draw(cuts(len(whole))))):
            covered = covers[min(number, len(covers) - 1)]
            out += events.feed(chunk, covered)
            out += events.release(covered)
            assert not events.waiting or events.wanted > covered
            assert events.counted <= covered
            seen = api_of(path).stream(ask, bound, rule)
            follow(seen, [out])
            assert seen.counted <= covered


@FEW_OR_MANY
@PATHS
def test_no_text_that_was_handed_out_is_free(path: str, examples: int) -> None:
    """Whether the upstream tells its usage, tells nonsense, breaks off or is cut short."""

    @fuzz(examples, askings(), streams(path, tamper=False), JSON, st.booleans())
    def check(asking: tuple[Ask, Bound, CountOutput], told: Told, nonsense: Json, cut_short: bool) -> None:
        usage = _event({"choices": [], "usage": nonsense, "type": "message_delta", "delta": {}})
        whole = Told([*told.events[:-1], usage, *told.events[-1:]], told.end).whole
        events = api_of(path).stream(*asking)
        out = follow(events, [whole])
        if cut_short and not events.done:
            events.cut_short(QUOTA)
        said = any(document_of(event) in SAYING[path] for event in out.replace(b"\r\n", b"\n").split(b"\n\n"))
        if said and events.usage is None:
            for complete in (False, True):
                metered = events.metered(complete=complete)
                assert metered.input > 0
                assert metered.output > 0
                assert metered.requests == 1


def document_of(event: bytes) -> Any:
    try:
        return json.loads(event.rpartition(b"data: ")[2])
    except ValueError:
        return None
