"""What the demo model says aloud and what it says of sound, asked by the real OpenAI client."""

import base64
import io
import json
import math
import struct
import wave
from typing import Any

import openai
import pytest

from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL, TRANSCRIBER

TEXT = "Hello, world"
SECONDS = len(TEXT) * 0.06


def wav(seconds: float, *, rate: int = 8000, channels: int = 2) -> bytes:
    """Silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(round(seconds * rate) * 2 * channels))
    return file.getvalue()


def samples_of(data: bytes) -> tuple[int, ...]:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        frames = file.readframes(file.getnframes())
        assert len(frames) == 2 * file.getnframes()
    return struct.unpack(f"<{len(frames) // 2}h", frames)


@pytest.mark.parametrize("response_format", ["mp3", "wav"])
async def test_speech_is_a_wav_as_long_as_its_text(client: openai.AsyncOpenAI, response_format: Any) -> None:
    answer = await client.audio.speech.create(model=MODEL, voice="alloy", input=TEXT, response_format=response_format)
    assert answer.response.headers["content-type"] == "audio/wav"
    samples = samples_of(answer.content)
    assert len(samples) == round(SECONDS * 24_000)
    first, comma = samples[: 24_000 * 6 // 100], samples[5 * 1440 : 6 * 1440]
    assert max(first) > 5000 and min(first) < -5000
    assert set(comma) == {0}


async def test_letters_sound_different_and_the_same_text_the_same(client: openai.AsyncOpenAI) -> None:
    first, again, other = [
        (await client.audio.speech.create(model=MODEL, voice="alloy", input=text)).content for text in ("a", "a", "b")
    ]
    assert first == again != other


async def test_speech_comes_in_pieces(client: openai.AsyncOpenAI) -> None:
    whole = await client.audio.speech.create(model=MODEL, voice="alloy", input=TEXT, response_format="pcm")
    async with client.audio.speech.with_streaming_response.create(
        model=MODEL, voice="alloy", input=TEXT, response_format="pcm"
    ) as answer:
        assert answer.headers["content-type"] == "audio/pcm"
        assert answer.headers["transfer-encoding"] == "chunked"
        pieces = [piece async for piece in answer.iter_bytes()]
    assert b"".join(pieces) == whole.content
    assert len(whole.content) == round(SECONDS * 48_000)


async def test_speech_as_events_ends_in_its_usage(client: openai.AsyncOpenAI) -> None:
    whole = await client.audio.speech.create(model=MODEL, voice="alloy", input=TEXT)
    async with client.audio.speech.with_streaming_response.create(
        model=MODEL, voice="alloy", input=TEXT, stream_format="sse"
    ) as answer:
        lines = [line async for line in answer.iter_lines()]
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) > 1
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == whole.content
    tokens = len(split_tokens(TEXT)), math.ceil(SECONDS / 0.05)
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": tokens[0], "output_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": "x" * 4097}, "input"),
        ({"response_format": "ogg"}, "response_format"),
        ({"stream_format": "both"}, "stream_format"),
    ],
)
async def test_what_it_cannot_say_is_refused_by_name(
    client: openai.AsyncOpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.audio.speech.create(model=MODEL, voice="alloy", input=TEXT, extra_body=fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("file", "said", "seconds"),
    [
        (wav(2.5), "2.50 seconds", 3),
        (wav(200, rate=16_000), "200.00 seconds", 200),  # longer than what is kept of a file
        (wav(4)[:-32_000], "3.00 seconds", 4),  # says that it is longer than it is: 3 s and its header
        (b"\xff\xfb" + bytes(9998), "2.50 seconds", 3),
        (wav(1).replace(b"data", b"junk", 1)[:10_000], "2.50 seconds", 3),  # no data, and a chunk beyond the end
        (wav(1)[:30] + bytes(7970), "2.00 seconds", 2),  # of no channels
    ],
)
async def test_a_transcription_names_the_length(
    client: openai.AsyncOpenAI, file: bytes, said: str, seconds: int
) -> None:
    answer = await client.audio.transcriptions.create(model=MODEL, file=("sound.wav", file))
    assert "demo model" in answer.text and said in answer.text
    assert answer.usage is not None and answer.usage.type == "duration"
    assert answer.usage.seconds == seconds


async def test_a_transcriber_counts_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.audio.transcriptions.create(model=TRANSCRIBER, file=("a.wav", wav(1.5)), prompt="Two words")
    assert answer.usage is not None and answer.usage.type == "tokens"
    assert answer.usage.input_token_details is not None
    assert (answer.usage.input_token_details.text_tokens, answer.usage.input_token_details.audio_tokens) == (2, 15)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (17, len(split_tokens(answer.text)))
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's word on translations
@pytest.mark.parametrize("endpoint", ["transcriptions", "translations"])
async def test_the_other_formats(client: openai.AsyncOpenAI, endpoint: str) -> None:
    ask = getattr(client.audio, endpoint).create
    file = ("a.wav", wav(61.5))
    plain = (await ask(model=MODEL, file=file)).text
    assert await ask(model=MODEL, file=file, response_format="text") == f"{plain}\n"
    srt = await ask(model=MODEL, file=file, response_format="srt")
    assert srt == f"1\n00:00:00,000 --> 00:01:01,500\n{plain}\n\n"
    vtt = await ask(model=MODEL, file=file, response_format="vtt")
    assert vtt == f"WEBVTT\n\n00:00:00.000 --> 00:01:01.500\n{plain}\n\n"
    verbose = await ask(model=MODEL, file=file, response_format="verbose_json")
    assert (verbose.text, float(verbose.duration), verbose.segments[0].end) == (plain, 61.5, 61.5)


async def test_a_transcription_can_be_streamed(client: openai.AsyncOpenAI) -> None:
    file = ("a.wav", wav(1.5))
    whole = await client.audio.transcriptions.create(model=TRANSCRIBER, file=file)
    stream = await client.audio.transcriptions.create(model=TRANSCRIBER, file=file, stream=True)
    *deltas, done = [event async for event in stream]
    assert {event.type for event in deltas} == {"transcript.text.delta"} and len(deltas) > 1
    assert "".join(event.delta for event in deltas) == whole.text
    assert done.type == "transcript.text.done" and done.text == whole.text
    assert done.usage is not None and whole.usage is not None
    assert done.usage.to_dict() == whole.usage.to_dict()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"file": ("a.wav", b"")}, "file"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "srt", "stream": True}, "response_format"),
    ],
)
async def test_what_it_cannot_transcribe_is_refused_by_name(
    client: openai.AsyncOpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.audio.transcriptions.create(**({"model": MODEL, "file": ("a.wav", wav(1))} | fields))
    assert refused.value.param == param


async def test_a_file_beyond_the_limit_and_an_unknown_model_are_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        await client.audio.transcriptions.create(model=MODEL, file=("a.mp3", bytes(33 * 1024 * 1024)))
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.audio.transcriptions.create(model="whisper-9", file=("a.wav", wav(1)))
    assert unknown.value.code == "model_not_found"
