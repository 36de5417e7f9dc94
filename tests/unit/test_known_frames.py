"""An event that differs from one before it only in its text is not searched again; nothing else comes of that."""

import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.chat_stream import ChatStream
from gateway.apis.messages_stream import MessageStream
from gateway.apis.transcriptions import TranscriptStream
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.sse import EventStream, Overrun

BOUND = Bound(100, 1, 50)
ASK = Ask("chat", "m", 400, stream=True)


class Searching(ChatStream):
    """Searches every event."""

    def _learn_frame(self, block: bytes, texts: list[bytes]) -> None:
        pass


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(text: str, **beside: object) -> bytes:
    return event({"id": "1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}}], **beside})


EVENTS = st.one_of(
    st.builds(
        chunk, st.sampled_from(["a", " word", "", "data", "usage", "[DONE]", "1", "m", 'say "no"', "\\", "é", "\n"])
    ),
    st.builds(chunk, st.text(max_size=6), logprobs=st.just({"content": [{"token": "a"}]})),
    st.just(chunk("", usage={"prompt_tokens": 3, "completion_tokens": 4})),
    st.just(b": a comment\n\n"),
    st.just(b"data: [DONE]\n\n"),
)


def told(stream: EventStream, blocks: list[bytes], covered: int) -> list[object]:
    said: list[object] = []
    try:
        said += [(stream.feed(block, covered), stream.counted, stream.waiting, stream.done) for block in blocks]
    except Overrun:
        said.append("overrun")
    return [*said, stream.metered(complete=False)]


@given(st.lists(EVENTS, max_size=12), st.integers(0, 12))
def test_what_is_handed_out_and_counted_is_the_same(events: list[bytes], covered: int) -> None:
    assert told(ChatStream(ASK, BOUND), events, covered) == told(Searching(ASK, BOUND), events, covered)


@given(st.lists(st.lists(EVENTS, max_size=12), max_size=6), st.integers(0, 60))
def test_many_at_once_are_the_same_too(blocks: list[list[bytes]], covered: int) -> None:
    joined = [b"".join(block) for block in blocks]
    assert told(ChatStream(ASK, BOUND), joined, covered) == told(Searching(ASK, BOUND), joined, covered)


@given(st.lists(st.lists(EVENTS, max_size=12), max_size=6), st.integers(0, 60))
def test_what_is_counted_does_not_depend_on_what_comes_together(blocks: list[list[bytes]], covered: int) -> None:
    one_by_one, at_once = Searching(ASK, BOUND), ChatStream(ASK, BOUND)
    for block in blocks:
        try:
            alone = b"".join(one_by_one.feed(event, covered) for event in block)
            together = at_once.feed(b"".join(block), covered)
        except Overrun:
            return  # which the one says sooner
        assert together == alone
        assert (at_once.counted, at_once.waiting, at_once.done) == (
            one_by_one.counted, one_by_one.waiting, one_by_one.done
        )  # fmt: skip
        assert at_once.wanted == one_by_one.wanted
        assert at_once.metered(complete=False) == one_by_one.metered(complete=False)


def test_known_events_that_come_together_are_not_searched_however_many() -> None:
    stream = ChatStream(ASK, Bound(100, 1, 1000))
    stream.feed(chunk("first"))
    searched: list[bytes] = []
    stream._searched = lambda block, covered: searched.append(block) or block  # type: ignore[method-assign,func-returns-value]
    many = b"".join(chunk(text) for text in ("a", 'say "no"', "\n", " word") * 100)
    other = event({"choices": [{"delta": {"role": "assistant"}}]})
    assert stream.feed(many) == many
    assert stream.feed(many + other + many + other[:10]) == many + other + many
    assert searched == [other]
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
