"""Answers that say something without a text, or in a way that is hard to read: nothing rides free.

And what is owed for a stream that its client leaves before anything was said.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.chat_stream import ChatStream, TextStream
from gateway.apis.messages_stream import MessageStream
from gateway.apis.registry import APIS
from gateway.apis.responses_stream import ResponseStream
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import EventStream
from tests.unit.figures import used

ASK = Ask("chat", "m", input_bytes=40, stream=True)  # estimated as 10 tokens
BOUND = Bound(1000, 1, 1000)
DONE = b"data: [DONE]\n\n"
STREAMS: dict[str, type[EventStream]] = {
    "chat": ChatStream,
    "text": TextStream,
    "messages": MessageStream,
    "responses": ResponseStream,
}


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def followed(name: str, *events: bytes, bound: Bound = BOUND) -> EventStream:
    stream = STREAMS[name](ASK, bound, "chunks")
    for said in events:
        stream.feed(said)
    return stream


def charged(*choices: Any, bound: Bound = BOUND, **members: Any) -> Metered:
    read = APIS["/chat/completions"].read_answer(json.dumps({"choices": list(choices), **members}).encode())
    assert read is not None
    return read.metered(ASK, bound)


# --- signs without a text -------------------------------------------------------------------------------------------

SILENT = {"index": 0, "message": {"role": "assistant", "content": ""}, "text": "", "finish_reason": "stop"}
ENDED = {"prompt_tokens": 7, "completion_tokens": 1}
TOKEN = {"token": "", "logprob": -0.1, "bytes": None, "top_logprobs": []}
SIGNS: list[tuple[dict[str, Any], int]] = [
    ({"stop_reason": "yes"}, 1),
    ({"stop_reason": 128009}, 1),
    ({"stop_reason": 0}, 1),
    ({"matched_stop": "yes"}, 1),
    ({"logprobs": {"content": [TOKEN, TOKEN], "refusal": None}}, 2),
    ({"logprobs": {"content": None, "refusal": [TOKEN]}}, 1),
    ({"logprobs": {"tokens": ["", "", ""], "token_logprobs": [-1, -1, -1], "top_logprobs": [{}, {}, {}]}}, 3),
    ({"logprobs": {"tokens": [], "top_logprobs": [{"a": -1}]}}, 1),
    ({"prompt_logprobs": [None, {"5": {"logprob": -1}}]}, 1),
    ({"token_ids": [5, 6]}, 2),
]
NO_SIGNS: list[dict[str, Any]] = [
    {"stop_reason": None},
    {"stop_reason": ""},
    {"stop_reason": False, "logprobs": None},
    {"logprobs": {"content": [], "refusal": None}},
    {"logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}},
    {"logprobs": [], "matched_stop": None, "prompt_logprobs": None, "token_ids": []},
]


@pytest.mark.parametrize(("sign", "tokens"), SIGNS, ids=str)
def test_an_answer_that_says_something_without_a_text_is_paid(sign: dict[str, Any], tokens: int) -> None:
    assert charged({**SILENT, **sign}, usage=ENDED) == used(7, 1)
    assert charged({**SILENT, **sign}) == used(10, tokens)


def test_logprobs_of_the_prompt_beside_the_choices_are_paid() -> None:
    assert charged(SILENT, usage=ENDED, prompt_logprobs=[None, {"5": {"logprob": -1}}]) == used(7, 1)


@pytest.mark.parametrize("sign", NO_SIGNS, ids=str)
def test_an_answer_that_says_nothing_at_all_is_free(sign: dict[str, Any]) -> None:
    assert charged({**SILENT, **sign}, usage=ENDED) == Metered()


def test_output_that_is_not_shown_is_paid_but_for_the_end_of_each_answer() -> None:
    assert charged(SILENT, usage={"prompt_tokens": 7, "completion_tokens": 2}) == used(7, 2)
    two = Bound(1000, 2, 1000)
    assert charged(SILENT, SILENT, usage={"prompt_tokens": 7, "completion_tokens": 2}, bound=two) == Metered()
    assert charged(SILENT, SILENT, usage={"prompt_tokens": 7, "completion_tokens": 3}, bound=two) == used(7, 3)


@pytest.mark.parametrize("name", ["chat", "text"])
@pytest.mark.parametrize("sign", [sign for sign, _ in SIGNS if "prompt_logprobs" not in sign], ids=str)
def test_an_event_that_says_something_without_a_text_is_output(name: str, sign: dict[str, Any]) -> None:
    said = event({"choices": [{"index": 0, "delta": {"content": ""}, "text": "", **sign}]})
    stream = followed(name, said, event({"choices": [], "usage": ENDED}), DONE)
    assert stream.counted == 1
    assert stream.metered(complete=True) == used(7, 1)
    waiting = STREAMS[name](ASK, BOUND, "chunks")
    assert waiting.feed(said, covered=0) == b""


@pytest.mark.parametrize("name", ["chat", "text"])
@pytest.mark.parametrize("sign", NO_SIGNS, ids=str)
def test_an_event_that_says_nothing_at_all_is_free(name: str, sign: dict[str, Any]) -> None:
    said = event({"choices": [{"index": 0, "delta": {"content": ""}, "text": "", "finish_reason": "stop", **sign}]})
    stream = followed(name, said, event({"choices": [], "usage": ENDED}), DONE)
    assert stream.metered(complete=True) == Metered()


def test_the_text_and_its_logprobs_are_one_token() -> None:
    said = event({"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [TOKEN]}}]})
    assert followed("chat", said + said).counted == 2


@pytest.mark.parametrize("name", ["chat", "text"])
def test_a_stream_of_output_that_is_not_shown_is_paid(name: str) -> None:
    silent = event({"choices": [{"index": 0, "delta": {"content": ""}, "text": ""}]})
    hidden = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
    assert followed(name, silent, hidden, DONE).metered(complete=True) == used(7, 2)
    assert followed(name, silent, hidden, DONE, bound=Bound(1000, 2, 1000)).metered(complete=True) == Metered()


# --- what is owed before anything was said --------------------------------------------------------------------------


def started(**usage: int) -> bytes:
    figures = {"input_tokens": 5, "output_tokens": 3, **usage}
    return event({"type": "message_start", "message": {"type": "message", "content": [], "usage": figures}})


def test_who_leaves_after_the_prompt_was_kept_pays_for_it() -> None:
    stream = followed("messages", started(cache_creation_input_tokens=200, cache_read_input_tokens=9))
    assert (stream.payable, stream.has_output) == (True, False)
    assert stream.metered(complete=False) == used(214, 3, cache_read=9, cache_write=200)


def test_who_leaves_before_anything_was_said_or_kept_owes_nothing() -> None:
    """What the start of a message says of its output is no more than a guess."""
    stream = followed("messages", started())
    assert not stream.payable
    assert stream.metered(complete=False) == Metered()
    for name in STREAMS:
        assert not followed(name, b": ping\n\n").payable


def test_secret_reasoning_is_owed_for_before_the_end() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9}}
    stream = followed("chat", event({"choices": [], "usage": usage}))
    assert stream.payable
    assert stream.metered(complete=False) == used(7, 9, reasoning=9)


def test_output_makes_a_stream_payable() -> None:
    said = {
        "chat": {"choices": [{"index": 0, "delta": {"content": "a"}}]},
        "text": {"choices": [{"index": 0, "text": "a"}]},
        "messages": {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        "responses": {"type": "response.output_text.delta", "delta": "a"},
    }
    for name, value in said.items():
        assert followed(name, event(value)).payable


_FIGURE = st.none() | st.integers(-1, 2000) | st.sampled_from([10**30, 7.0, True, "7", []])
_DETAILS = st.fixed_dictionaries({}, optional=dict.fromkeys(("cached_tokens", "reasoning_tokens"), _FIGURE))
_USAGES = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        "prompt_tokens completion_tokens total_tokens input_tokens output_tokens cache_creation_input_tokens".split(),
        _FIGURE,
    )
    | dict.fromkeys(("completion_tokens_details", "output_tokens_details", "input_tokens_details"), _DETAILS),
)
_TEXTS = st.sampled_from(["", "a", "some words", None, 5, ["x"], {"a": "b"}])
_EVENTS = st.one_of(
    st.builds(lambda text: {"choices": [{"index": 0, "delta": {"content": text}, "text": text}]}, _TEXTS),
    st.builds(lambda usage: {"choices": [], "usage": usage}, _USAGES),
    st.builds(lambda usage: {"choices": [{"finish_reason": "stop"}], "usage": usage}, _USAGES),
    st.builds(lambda usage: {"type": "message_start", "message": {"usage": usage}}, _USAGES),
    st.builds(lambda usage: {"type": "message_delta", "delta": {}, "usage": usage}, _USAGES),
    st.builds(lambda text: {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}, _TEXTS),
    st.builds(lambda text: {"type": "response.output_text.delta", "delta": text}, _TEXTS),
    st.builds(lambda usage: {"type": "response.completed", "response": {"usage": usage}}, _USAGES),
)


@pytest.mark.parametrize("name", STREAMS)
@given(said=st.lists(_EVENTS, max_size=6), several=st.booleans())
def test_what_is_payable_is_charged_within_the_bound(name: str, said: list[Any], several: bool) -> None:
    bound = Bound(1000, 2 if several else 1, 50)
    stream = followed(name, *map(event, said), bound=bound)
    for complete in (False, True):
        metered = stream.metered(complete=complete)
        assert bool(metered.requests) == stream.payable
        assert min(metered.figures().values(), default=0) >= 0
        assert metered.input <= 1000 and metered.output <= bound.metered(50).output
        assert metered.plain_input >= 0 and metered.plain_output >= 0


# --- what is hard to read -------------------------------------------------------------------------------------------

UNREADABLE = [
    b'data: {"choices": [{"delta": {"content": "abc\n\n',
    b"data: plain words\n\n",
    b'data: ["a", "list"]\n\n',
    b'data: "a text"\n\n',
    b"data: 5\n\n",
    b"data: \xff\xfe\xfd\n\n",
    b"data: {not\ndata: json}\n\n",
    b"data: " + b"[" * 5000 + b"\n\n",
]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("said", UNREADABLE, ids=lambda said: repr(said[:20]))
def test_an_event_that_nobody_can_read_counts_by_its_bytes(name: str, said: bytes) -> None:
    stream = followed(name, said)
    size = len(b"\n".join(line[6:] for line in said.splitlines() if line))
    assert stream.metered(complete=False) == used(10, min(1000, -(-size // 4)))
    assert STREAMS[name](ASK, BOUND, "chunks").feed(said, covered=0) == b""


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "said",
    [b": a comment\n\n", b"event: ping\n\n", b"data: null\n\n", b"data:\n\n", b"data: {}\n\n", b"retry: 5\n\n",
     b"event: error\ndata: broke\n\n"],
)  # fmt: skip
def test_an_event_that_says_nothing_counts_nothing(name: str, said: bytes) -> None:
    assert not followed(name, said).has_output


@given(st.lists(st.sampled_from([*UNREADABLE, b"data: null\n\n", b": ping\n\n"]), max_size=6), st.data())
def test_however_it_is_cut_it_counts_the_same(said: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(said)
    cut = data.draw(st.integers(0, len(whole)))
    for name in STREAMS:
        once = followed(name, whole)
        assert once.counted == followed(name, whole[:cut], whole[cut:]).counted == followed(name, *said).counted


#: What JSON has not, and readers of it take all the same.
ODD = [b"-Infinity", b"NaN", b'"\\ud83d"', b'"\xff"']


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_the_usage_of_an_event_that_is_hard_to_read_counts(odd: bytes) -> None:
    """Python's own reader takes each of these, and so do clients."""
    reported = b'"usage": {"prompt_tokens": 7, "completion_tokens": 5}'
    last = b'data: {"choices": [], %b, "odd": %b}\n\n' % (reported, odd)
    word = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    assert followed("chat", word, last, DONE).metered(complete=True) == used(7, 5)

    started_oddly = b'data: {"type": "message_start", "message": {"usage": {"input_tokens": 7, "output_tokens": 1}, '
    text = event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}})
    stream = followed("messages", started_oddly + b'"odd": %b}}\n\n' % odd, text)
    assert stream.metered(complete=False) == used(7, 1)

    response = b'{"status": "completed", "usage": {"input_tokens": 7, "output_tokens": 5}, "odd": %b}' % odd
    end = b'data: {"type": "response.completed", "response": %b}\n\n' % response
    stream = followed("responses", event({"type": "response.output_text.delta", "delta": "a"}), end)
    assert stream.done
    assert stream.metered(complete=True) == used(7, 5)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_delta_that_is_hard_to_read_is_output(odd: bytes) -> None:
    delta = b'data: {"type": "response.output_text.delta", "delta": "a", "logprobs": [{"logprob": %b}]}\n\n' % odd
    assert followed("responses", delta, delta).counted == 2


def test_data_on_several_lines_is_read_as_one() -> None:
    spread = b'data: {"choices": [{"index": 0, "delta": {"content":\ndata: "abcdefgh"}}]}\n\n'
    assert followed("chat", spread).counted == 2
    report = b'data: {"choices": [], "usage":\ndata: {"prompt_tokens": 7, "completion_tokens": 5}}\n\n'
    assert followed("chat", spread, report, DONE).metered(complete=True) == used(7, 5)
    block = b'data: {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "input":\n'
    assert followed("messages", block + b'data: {"a":\ndata: "abcdefghijklmnopqrstuvwxyz"}}}\n\n').counted >= 8
