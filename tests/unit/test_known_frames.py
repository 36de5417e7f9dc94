"""An event that differs from one before it only in its text is not searched again; nothing else comes of that."""

import json
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.chat_stream import ChatStream
from gateway.apis.messages_stream import MessageStream
from gateway.apis.transcriptions import TranscriptStream
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import EventStream, Overrun

BOUND = Bound(100, 1, 50)
ASK = Ask("chat", "m", 400, stream=True)


class Searching(ChatStream):
    """Searches every event, by itself."""

    def _learn_frame(self, block: bytes, texts: list[bytes]) -> None:
        pass

    def _needs_a_look(self, block: bytes) -> bool:
        return True


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(text: str, **beside: object) -> bytes:
    return event({"id": "1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}], **beside})


TEXTS = st.sampled_from(["a", " word", "", "data", "usage", "[DONE]", "1", "m", 'say "no"', "\\", "é", "\n", "null"])
EVENTS = st.one_of(
    st.builds(chunk, TEXTS),
    st.builds(chunk, TEXTS, usage=st.none()),
    st.builds(chunk, st.text(max_size=6), logprobs=st.just({"content": [{"token": "a"}]})),
    st.just(chunk("", usage={"prompt_tokens": 3, "completion_tokens": 4})),
    st.just(b": a comment\n\n"),
    st.just(b"data: [DONE]\n\n"),
)
#: Of one kind as a rule, as streams are.
STREAMS = st.one_of(
    st.lists(EVENTS, max_size=12),
    st.lists(st.builds(chunk, TEXTS), max_size=30),
    st.lists(st.builds(chunk, TEXTS, usage=st.none()), max_size=30),
)
ASKS = st.builds(
    lambda usage, running: Ask("chat", "m", 400, stream=True, wants_usage=usage, wants_running_usage=running),
    st.booleans(),
    st.booleans(),
)
RULES: st.SearchStrategy[CountOutput] = st.sampled_from(["chunks", "bytes", "usage", "maximum"])


def fed(stream: EventStream, block: bytes, covered: int) -> bytes:
    """What the client may have of block, the short way where there is one."""
    return stream.takes(block, covered) or stream.feed(block, covered)


def told(stream: EventStream, blocks: list[bytes], covered: int) -> list[object]:
    said: list[object] = []
    try:
        said += [(fed(stream, block, covered), stream.counted, stream.waiting, stream.done) for block in blocks]
    except Overrun:
        said.append("overrun")
    return [*said, stream.metered(complete=False)]


@given(STREAMS, st.integers(0, 60), ASKS, RULES)
def test_what_is_handed_out_and_counted_is_the_same(
    events: list[bytes], covered: int, ask: Ask, rule: CountOutput
) -> None:
    assert told(ChatStream(ask, BOUND, rule), events, covered) == told(Searching(ask, BOUND, rule), events, covered)


@given(st.lists(STREAMS, max_size=4), st.integers(0, 60), ASKS, RULES)
def test_what_is_counted_does_not_depend_on_what_comes_together(
    blocks: list[list[bytes]], covered: int, ask: Ask, rule: CountOutput
) -> None:
    one_by_one, at_once = Searching(ask, BOUND, rule), ChatStream(ask, BOUND, rule)
    for block in blocks:
        try:
            alone = b"".join(one_by_one.feed(event, covered) for event in block)
            together = fed(at_once, b"".join(block), covered)
        except Overrun:
            return  # which the one says sooner
        assert together == alone
        for name in ("counted", "waiting", "wanted", "done"):
            assert getattr(at_once, name) == getattr(one_by_one, name)
        assert at_once.metered(complete=False) == one_by_one.metered(complete=False)


def test_an_empty_usage_that_the_client_did_not_ask_for_is_kept_from_every_event() -> None:
    stream = ChatStream(ASK, Bound(100, 1, 1000))
    assert stream.feed(chunk("a", usage=None)) == chunk("a")
    assert stream.takes(chunk("b", usage=None)) == chunk("b")
    assert stream.takes(chunk("b", usage=None) + chunk("c", usage=None)) == chunk("b") + chunk("c")
    assert stream.feed(chunk("d", usage=None) + chunk("e", usage=None)) == chunk("d") + chunk("e")
    assert stream.counted == 6


def test_known_events_that_come_together_are_not_searched_however_many() -> None:
    stream = ChatStream(ASK, Bound(100, 1, 1000))
    stream.feed(chunk("first"))
    many = b"".join(chunk(text) for text in ("a", 'say "no"', "\n", " word") * 100)
    other = event({"choices": [{"delta": {"role": "assistant"}}]})
    with patch.object(stream, "_searched", wraps=stream._searched) as searched:
        assert stream.feed(many) == many
        assert stream.feed(many + other + many + other[:10]) == many + other + many
    assert [call.args[0] for call in searched.call_args_list] == [other]
    assert stream.counted == 1 + 1200
    assert not stream.takes(chunk("b"))  # it belongs behind the part that was kept


def test_an_event_that_waits_is_not_overtaken() -> None:
    stream = ChatStream(ASK, BOUND)
    assert stream.feed(chunk("a") + chunk("b"), 2) == chunk("a") + chunk("b")
    assert stream.takes(chunk("c"), 3)
    assert not stream.takes(chunk("d") + chunk("e"), 4)
    assert stream.feed(chunk("d") + chunk("e"), 4) == chunk("d")
    assert not stream.takes(chunk("f"), 10)
    assert (stream.waiting, stream.wanted) == (True, 5)


def test_a_known_frame_is_used() -> None:
    stream = ChatStream(ASK, BOUND)
    stream.feed(chunk("first"))
    searched: list[bytes] = []
    stream._outputs = lambda block: searched.append(block) or []  # type: ignore[method-assign,func-returns-value]
    assert stream.feed(chunk(" word")) == chunk(" word")
    assert (searched, stream.counted) == ([], 3)  # of ten bytes


def test_a_transcript_that_says_data_is_counted_to_its_end() -> None:
    units = Metered(audio_ms=60_000, requests=1)
    ask = Ask("transcription", "m", None, stream=True, units=units, likely_audio_ms=1000)
    charged = []
    for first in ("data", "dat"):
        stream = TranscriptStream(ask, Bound(100, 1, 1000, units=units))
        for text in (first, *[" and so on"] * 100):
            stream.feed(event({"type": "transcript.text.delta", "delta": text}))
        charged.append(stream.metered(complete=False).output)
    assert charged[0] >= charged[1] > 200


def test_the_name_of_an_event_is_no_text() -> None:
    stream = MessageStream(ASK, BOUND)
    stream.feed(event({"type": "foo_delta"}))
    stream.feed(event({"type": "message_stop"}))
    assert stream.done


@pytest.mark.timeout(60)  # a tenth of a second, unless the whole block is searched anew for each of its events
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("between", [b"", b": a comment"])
def test_a_large_block_is_searched_once(end: bytes, between: bytes) -> None:
    one = chunk("word").rstrip(b"\n") + end + (between + end if between else b"")
    stream = ChatStream(ASK, Bound(100, 1, 10**6))
    assert stream.feed(one * 50_000) == one * 50_000
    assert stream.counted == 50_000
