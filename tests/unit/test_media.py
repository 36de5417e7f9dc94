"""What streams of pictures, transcripts and voices pass on and cost, however their bytes were cut."""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.images import PicturesStream
from gateway.apis.media import MediaStream, read_media_usage
from gateway.apis.speech import SpeechStream
from gateway.apis.transcriptions import TranscriptStream, read_text, said_ms
from gateway.domain.metered import Images, Metered
from gateway.domain.price import AUTO, Prices, TokenPrices
from gateway.domain.request import Ask, Bound

KIND = Images("1024x1024", "high", 2)
TOKENS = TokenPrices(5, 7, audio_input_femto=11, image_input_femto=13, audio_output_femto=17, image_output_femto=19)
PRICES = Prices(
    TOKENS, request_femto=1, audio_ms_femto=3, character_femto=2,
    images={("1024x1024", "high"): 1000, ("1024x1024", "low"): 400, ("*", "*"): 200},
)  # fmt: skip


def picture_stream(kind: Images = KIND) -> PicturesStream:
    ask = Ask(
        "image_generation", "m", 40, completions=kind.count, stream=True, units=Metered(images=(kind,), requests=1)
    )
    dearest = Images(*PRICES.dearest_image(kind.size, kind.quality), kind.count)
    return PicturesStream(ask, Bound(100, kind.count, 50, units=Metered(images=(dearest,), requests=1)))


def transcript_stream() -> TranscriptStream:
    units = Metered(audio_ms=60_000, requests=1)
    ask = Ask("transcription", "m", None, stream=True, units=units, likely_audio_ms=7000)
    return TranscriptStream(ask, Bound(100, 1, 50, units=units))


def speech_stream() -> SpeechStream:
    units = Metered(characters=12, requests=1)
    return SpeechStream(Ask("speech", "m", 40, stream=True, units=units), Bound(100, 1, 50, units=units))


STREAMS = {"pictures": picture_stream, "transcript": transcript_stream, "speech": speech_stream}
PIECES = {
    "pictures": {"type": "image_generation.partial_image", "b64_json": "QUJD"},
    "transcript": {"type": "transcript.text.delta", "delta": 'a "usage" of "error" and [DONE]'},
    "speech": {"type": "speech.audio.delta", "audio": "QUJD"},
}
LASTS: dict[str, dict[str, Any]] = {
    "pictures": {"type": "image_generation.completed", "b64_json": "QUJD"},
    "transcript": {"type": "transcript.text.done", "text": "Hello!"},
    "speech": {"type": "speech.audio.done"},
}
USAGE = {"input_tokens": 9, "output_tokens": 20}


def event(document: Any, end: str = "\n", named: bool = False) -> bytes:
    name = f"event: {document['type']}{end}" if named else ""
    return f"{name}data: {json.dumps(document)}{end}{end}".encode()


def fed(stream: MediaStream, pieces: Sequence[bytes]) -> bytes:
    return b"".join([*(stream.feed(piece) for piece in pieces), stream.end()])


def cut(whole: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = [*sorted(place % (len(whole) + 1) for place in cuts), len(whole)]
    starts = [0, *ends[:-1]]
    return [whole[start:end] for start, end in zip(starts, ends, strict=True) if start < end]


@pytest.mark.parametrize("kind", STREAMS)
@given(
    pieces=st.integers(0, 4), usage=st.booleans(), named=st.booleans(), end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(), cuts=st.lists(st.integers(0, 10**6), max_size=30), comment=st.booleans(),
)  # fmt: skip
def test_a_stream_is_passed_on_unchanged_and_costs_the_same_however_it_was_cut(
    kind: str, pieces: int, usage: bool, named: bool, end: str, mark: bool, cuts: list[int], comment: bool
) -> None:
    last = LASTS[kind] | ({"usage": USAGE} if usage else {})
    whole = b": hello\n\n" if comment else b""
    whole += event(PIECES[kind], end, named) * pieces + event(last, end, named)
    whole += (b": bye\n\n" if comment else b"") + (b"data: [DONE]\n\n" if mark else b"")
    at_once, stream = STREAMS[kind](), STREAMS[kind]()
    if kind == "pictures":  # two of them were asked for
        whole = event(last, end, named) + whole
    shown = fed(stream, cut(whole, cuts))
    assert shown + stream.closing(None) == fed(at_once, [whole]) + at_once.closing(None) == whole
    assert (stream.done, stream.complete, stream.failed) == (True, True, False)
    assert stream.metered(complete=True) == at_once.metered(complete=True)
    assert PRICES.femto(stream.metered(complete=True)) > 0


@pytest.mark.parametrize("kind", STREAMS)
@given(st.data())
def test_no_stream_costs_more_than_its_bound_or_fails_whatever_it_says(kind: str, data: st.DataObject) -> None:
    figure = st.one_of(st.integers(-5, 10**12), st.floats(), st.text(max_size=3), st.none(), st.booleans())
    details = st.dictionaries(st.sampled_from(["cached_tokens", "audio_tokens", "image_tokens"]), figure)
    usage = st.one_of(
        figure,
        st.fixed_dictionaries(
            {},
            optional={
                "input_tokens": figure,
                "output_tokens": figure,
                "seconds": figure,
                "input_tokens_details": details,
                "input_token_details": details,
                "output_tokens_details": details,
            },
        ),
    )
    members = st.fixed_dictionaries(
        {},
        optional={"usage": usage, "size": figure, "quality": st.sampled_from(["high", "low", 7]), "duration": figure},
    )
    said = data.draw(st.lists(st.tuples(st.sampled_from([PIECES[kind], LASTS[kind]]), members), max_size=6))
    whole = b"".join(event({**document, **more}) for document, more in said)
    stream = STREAMS[kind]()
    shown = fed(stream, cut(whole, data.draw(st.lists(st.integers(0, 10**6), max_size=10))))
    most = PRICES.most_femto(stream._bound.metered(stream._bound.output_tokens_each))
    for complete in (False, True) if stream.complete else (False,):
        metered = stream.metered(complete=complete)
        assert all(count >= 0 for count in metered.figures().values())
        assert metered.plain_input >= 0
        assert metered.plain_output >= 0
        assert 0 <= PRICES.femto(metered) <= most
        assert not shown or PRICES.femto(metered) > 0  # nothing is had for nothing
    stream.closing({"cost": orjson.Fragment("1"), "credits": {}})


def test_the_cost_is_written_into_the_last_usage_alone() -> None:
    stream = picture_stream()
    first, second = (LASTS["pictures"] | {"usage": USAGE, "number": number} for number in (1, 2))
    shown = fed(stream, [event(first, named=True) + event(second, named=True)])
    assert shown == event(first, named=True)
    closing = stream.closing({"cost": orjson.Fragment("0.5")})
    assert closing.startswith(b"event: image_generation.completed\ndata: ")
    assert json.loads(closing.partition(b"data: ")[2]) == second | {"usage": USAGE | {"cost": 0.5}}


def test_a_picture_is_paid_for_once_any_of_it_was_shown() -> None:
    stream = picture_stream()
    assert stream.metered(complete=False) == Metered()
    low = {"size": "1024x1024", "quality": "low"}
    stream.feed(event(PIECES["pictures"]))
    assert stream.metered(complete=False).image_count == 1
    stream.feed(event(LASTS["pictures"] | low))
    assert stream.metered(complete=False).image_count == 1
    stream.feed(event(PIECES["pictures"]))
    assert stream.metered(complete=False).image_count == 2
    stream.feed(event(LASTS["pictures"] | low))
    assert stream.metered(complete=False).image_count == 2
    assert stream.complete


def test_a_picture_of_any_kind_costs_what_the_upstream_says_it_became() -> None:
    stream = picture_stream(Images(AUTO, AUTO, 1))
    stream.feed(event(LASTS["pictures"] | {"size": "1024x1024", "quality": "low"}))
    assert stream.metered(complete=True).images == (Images("1024x1024", "low", 1),)


@pytest.mark.parametrize("kind", STREAMS)
def test_an_error_among_the_events_ends_the_stream(kind: str) -> None:
    for error in ({"error": {"message": "no"}}, {"type": "error", "message": "no"}):
        stream = STREAMS[kind]()
        whole = event(PIECES[kind]) + event(error)
        assert fed(stream, [whole + event(LASTS[kind])]) == whole
        assert (stream.failed, stream.error_shown) == (True, "error" in error)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_ends_before_its_last_event_is_not_done(kind: str) -> None:
    stream = STREAMS[kind]()
    fed(stream, [event(PIECES[kind])])
    assert (stream.done, stream.complete) == (False, False)


def test_a_usage_is_read_by_its_kinds() -> None:
    details = {"text_tokens": 4, "image_tokens": 6, "cached_tokens": 1}
    usage = read_media_usage(USAGE | {"input_tokens_details": details}, input_is="audio", output_is="image")
    assert usage is not None
    assert (usage.input_tokens, usage.image_input_tokens, usage.audio_input_tokens) == (9, 6, 0)
    assert (usage.cache_read_tokens, usage.output_tokens, usage.image_output_tokens) == (1, 20, 20)
    for nothing in (None, [], {}, {"input_tokens": 1}, {"input_tokens": -1, "output_tokens": 1}, {"type": "duration"}):
        assert read_media_usage(nothing) is None


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("plain", None), ("00:01.000 --> 00:02.500", 2500), ("01:00:01,000 --> 01:00:02,500", 3_602_500),
     ("00:05.000 --> 00:09.000\nx\n\n00:01.000 --> 00:02.000", 9000), ("00:01.000 -> 00:02.000", None)],
)  # fmt: skip
def test_the_last_subtitle_tells_the_length(text: str, milliseconds: int | None) -> None:
    transcript = read_text(text.encode(), timed=True)
    assert transcript is not None
    assert transcript.audio_ms == milliseconds


@given(st.decimals(0, 10**6, places=3))
def test_seconds_are_read_exactly(seconds: Decimal) -> None:
    whole_ms = int(seconds * 1000)
    assert said_ms({"duration": str(seconds)}) == whole_ms
    assert said_ms({"usage": {"seconds": float(seconds)}}) == whole_ms
