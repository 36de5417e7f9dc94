"""Speech in and speech out: what a recording and a text cost, and what becomes of large bodies and broken ones."""

import asyncio
import io
import json
import random
import struct
from collections.abc import AsyncIterator
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from aiohttp import ClientPayloadError, web

from tests.acceptance.conftest import Answer, new_account
from tests.acceptance.media import BOUNDARY, UPSTREAM_KEY, Bench, form, media_bench
from tests.acceptance.memory import forget_peak, peak_bytes
from tests.upstreams.scripted import event, gives, says, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

WHISPER, TOKENS, SHORT, FLAT = "whisper", "gpt-transcribe", "at-most-a-minute", "by-the-request"
TTS, TTS_TOKENS = "tts", "gpt-tts"
#: USD per second, and per million characters.
SECOND, CHARACTER = Decimal("0.000100001"), Decimal(15)
TEXT_IN, AUDIO_IN, TEXT_OUT, AUDIO_OUT = Decimal("2.5"), Decimal(6), Decimal(10), Decimal(12)
UPLOAD_MIB = 48

#: Half a second of an MP3's beginning: whose length its bytes do not tell.
MP3 = b"\xff\xfb\x90\x00" + bytes(7996)


def wav(seconds: float, *, rate: int = 16_000) -> bytes:
    """PCM, 16 bits, mono, with a header of 44 bytes."""
    data = bytes(round(seconds * rate) * 2)
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return header + b"data" + struct.pack("<I", len(data)) + data


def nano(cost: Decimal) -> Decimal:
    return cost.quantize(Decimal("0.000000001"), ROUND_CEILING)


def by_ms(milliseconds: int) -> Decimal:
    return nano(milliseconds * SECOND / 1000)


def longest_ms(file: bytes) -> int:
    """At 4 kbit/s."""
    return len(file) * 2


def likely_ms(file: bytes) -> int:
    """At 32 kbit/s."""
    return -(-len(file) // 4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    by_tokens = {
        "input_token_price": str(TEXT_IN),
        "output_token_price": str(TEXT_OUT),
        "audio_input_token_price": str(AUDIO_IN),
        "audio_output_token_price": str(AUDIO_OUT),
        "context_window": 16_000,
        "max_output_tokens": 2_000,
    }
    models: dict[str, dict[str, Any]] = {
        WHISPER: {"second_price": str(SECOND)},
        TOKENS: by_tokens,
        SHORT: {"second_price": str(SECOND), "max_audio_seconds": 60},
        FLAT: {"request_price": "0.003"},
        TTS: {"character_price": str(CHARACTER)},
        TTS_TOKENS: by_tokens,
    }
    limits = {"upload": f"{UPLOAD_MIB}MiB"}
    async with media_bench(tmp_path_factory.mktemp("audio") / "data", models, limits=limits) as bench:
        yield bench


async def transcribe(bench: Bench, file: bytes, script: Any, *, model: str = WHISPER, **fields: str) -> Answer:
    path = fields.pop("path", "/audio/transcriptions")
    sent = [("model", model), *fields.items()]
    return await bench.ask_form(path, sent, [("file", "a.mp3", "audio/mpeg", file)], script)


# --- transcriptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/audio/transcriptions", "/audio/translations"])
@pytest.mark.parametrize(
    ("said", "milliseconds"),
    [({"usage": {"type": "duration", "seconds": 9}}, 9000), ({"duration": 8.47}, 8470), ({"duration": "8.47"}, 8470),
     ({"duration": 8.47001}, 8471), ({"duration": 3, "usage": {"type": "duration", "seconds": 4}}, 4000),
     ({}, 2000), ({"duration": "long"}, 2000), ({"duration": -1}, 2000), ({"usage": {"seconds": True}}, 2000),
     ({"duration": 10**6}, 16_000), ({"duration": 1e300}, 2000), ({"usage": {"seconds": 0}}, 0)],
    ids=str,
)  # fmt: skip
async def test_a_recording_costs_its_length(bench: Bench, path: str, said: dict[str, Any], milliseconds: int) -> None:
    """What the upstream tells; without that its bytes at 32 kbit/s; never more than they can be at 4 kbit/s."""
    async with bench.charging(by_ms(milliseconds)):
        answer = await transcribe(bench, MP3, says({"text": "Hello!", **said}), path=path)
    assert (answer.status, answer.document) == (200, {"text": "Hello!", **said})
    assert answer.cost == by_ms(milliseconds)
    assert Decimal(answer.headers["x-credits-reserved"]) == by_ms(longest_ms(MP3))
    assert bench.asked.target == path


async def test_the_length_of_pcm_is_known_exactly(bench: Bench) -> None:
    file = wav(2.5)
    answer = await transcribe(bench, file, says({"text": "Hello!"}))
    assert answer.cost == by_ms(2500)
    assert Decimal(answer.headers["x-credits-reserved"]) == by_ms(3000)  # many upstreams bill whole seconds
    answer = await transcribe(bench, file, says({"text": "Hello!", "duration": 99}))
    assert answer.cost == by_ms(3000)


async def test_a_wav_header_that_is_not_true_holds_the_longer_of_what_it_can_mean(bench: Bench) -> None:
    """Otherwise an hour could be sold as a second."""
    lie = bytearray(wav(2.5))
    lie[32:34] = struct.pack("<H", 65_535)  # bytes of a sample of all channels, which many players never look at
    answer = await transcribe(bench, bytes(lie), says({"text": "Hello!", "duration": 2.5}))
    assert answer.cost == by_ms(2500)


async def test_a_model_may_have_a_longest_recording(bench: Bench) -> None:
    file = MP3 * 8  # at most 128 s, likely 16 s
    answer = await transcribe(bench, file, says({"text": "x", "duration": 61}), model=SHORT)
    assert Decimal(answer.headers["x-credits-reserved"]) == answer.cost == by_ms(60_000)


SRT = "1\n00:00:00,000 --> 00:00:02,500\nHello\n\n2\n00:00:02,500 --> 00:00:04,321\nthere\n\n"
VTT = "WEBVTT\n\n00:00.000 --> 00:02.500\nHello\n\n00:02.500 --> 00:05.001\nthere\n\n"


@pytest.mark.parametrize(
    ("answer_format", "text", "milliseconds"),
    [("text", "Hello there\n", 2000), ("text", "It says 00:00.000 --> 00:00.001", 2000),
     ("srt", SRT, 4321), ("vtt", VTT, 5001), ("srt", "", 0), ("text", "", 0), ("vtt", "WEBVTT\n\n", 2000)],
)  # fmt: skip
async def test_text_and_subtitles_come_as_they_are(
    bench: Bench, answer_format: Any, text: str, milliseconds: int
) -> None:
    bench.upstream.script = gives(text.encode(), "text/plain; charset=utf-8")
    async with bench.charging(by_ms(milliseconds)):
        raw = await bench.client.audio.transcriptions.with_raw_response.create(
            model=WHISPER, file=("a.mp3", MP3), response_format=answer_format
        )
    assert raw.content == text.encode()
    assert raw.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert Decimal(raw.headers["x-credits-cost"]) == by_ms(milliseconds)


async def test_the_sdk_transcribes_in_every_form(bench: Bench) -> None:
    segment = {"id": 0, "start": 0.0, "end": 7.5, "text": "Hello!", "seek": 0, "tokens": [1], "temperature": 0.0}
    segment |= {"avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    said = {"task": "transcribe", "language": "english", "duration": 7.5, "text": "Hello!", "segments": [segment]}
    bench.upstream.script = says(said)
    async with bench.charging(by_ms(7500)):
        answer = await bench.client.audio.transcriptions.create(
            model=WHISPER,
            file=("näme.mp3", MP3, "audio/mpeg"),
            language="en",
            prompt="A greeting.",
            response_format="verbose_json",
            temperature=0.5,
            timestamp_granularities=["word", "segment"],
        )
    assert answer.segments is not None
    assert answer.segments[0].end == 7.5
    sent = set(bench.asked.fields)
    assert {("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment")} < sent
    assert {("model", WHISPER), ("language", "en"), ("prompt", "A greeting."), ("temperature", "0.5")} < sent
    file = next(part for part in bench.asked.parts if part.filename)
    assert (file.name, file.content_type, file.content) == ("file", "audio/mpeg", MP3)
    assert bench.asked.headers["Authorization"] == f"Bearer {UPSTREAM_KEY}"

    bench.upstream.script = says({"text": "Hello!", "usage": {"type": "duration", "seconds": 8}})
    async with bench.charging(by_ms(8000)):
        plain = await bench.client.audio.transcriptions.create(
            model=WHISPER, file=MP3, chunking_strategy={"type": "server_vad", "threshold": 0.5}
        )
    assert plain.text == "Hello!"
    assert ("chunking_strategy[type]", "server_vad") in bench.asked.fields

    bench.upstream.script = says({"text": "Hello!"})
    async with bench.charging(by_ms(2000)):
        with pytest.deprecated_call():
            assert (await bench.client.audio.translations.create(model=WHISPER, file=MP3)).text == "Hello!"


def token_usage(text: int, audio: int, made: int) -> dict[str, Any]:
    details = {"text_tokens": text, "audio_tokens": audio}
    return {"type": "tokens", "input_tokens": text + audio, "output_tokens": made, "input_token_details": details}


def token_cost(text: int, audio: int, made: int) -> Decimal:
    return nano((text * TEXT_IN + audio * AUDIO_IN + made * TEXT_OUT) / 1_000_000)


async def test_a_recording_may_be_charged_by_tokens(bench: Bench) -> None:
    said = {"text": "Hello!", "usage": token_usage(14, 45, 3)}
    answer = await transcribe(bench, MP3, says(said), model=TOKENS)
    assert answer.cost == token_cost(14, 45, 3)
    assert Decimal(answer.headers["x-credits-reserved"]) == nano((16_000 * AUDIO_IN + 2000 * AUDIO_OUT) / 1_000_000)
    untold = {"text": "Hello!", "usage": {"input_tokens": 45, "output_tokens": 3}}
    assert (await transcribe(bench, MP3, says(untold), model=TOKENS)).cost == token_cost(0, 45, 3)


@pytest.mark.parametrize(
    ("answer_format", "said"),
    [("srt", "1\n00:00:00,000 --> 00:00:01,000\nHi.\n"), ("text", ""), ("json", json.dumps({"text": ""}))],
)
async def test_a_length_that_is_known_counts_whatever_was_understood(
    bench: Bench, answer_format: str, said: str
) -> None:
    async with bench.charging(by_ms(7500)):
        await transcribe(bench, wav(7.5), gives(said.encode(), "text/plain"), response_format=answer_format)


async def test_silence_that_was_listened_to_is_paid_for(bench: Bench) -> None:
    """It has no text, but the upstream says what it took to find that out."""
    said = {"text": "", "usage": token_usage(0, 900, 1)}
    assert (await transcribe(bench, MP3, says(said), model=TOKENS)).cost == token_cost(0, 900, 1)
    assert (await transcribe(bench, MP3, says({"text": "", "duration": 2.5}))).cost == by_ms(2500)
    assert (await transcribe(bench, MP3, says({"text": ""}))).cost == 0


async def test_tokens_that_nobody_told_are_ten_a_second_and_one_for_four_bytes(bench: Bench) -> None:
    answer = await transcribe(bench, MP3, says({"text": "Hello there!"}), model=TOKENS)
    assert answer.cost == token_cost(0, 20, 3)
    answer = await transcribe(bench, MP3, says({"text": "Hello there!", "duration": 7.01}), model=TOKENS)
    assert answer.cost == token_cost(0, 71, 3)


async def test_a_recording_may_have_a_price_by_the_request(bench: Bench) -> None:
    assert (await transcribe(bench, MP3, says({"text": "x", "duration": 7}), model=FLAT)).cost == Decimal("0.003")


@pytest.mark.parametrize("files_first", [False, True])
async def test_the_file_may_stand_before_the_fields(bench: Bench, files_first: bool) -> None:
    fields, files = [("model", WHISPER), ("language", "en")], [("file", "a.mp3", "audio/mpeg", MP3)]
    script = says({"text": "Hello!", "duration": 2})
    answer = await bench.ask_form("/audio/transcriptions", fields, files, script, files_first=files_first)
    assert answer.cost == by_ms(2000)
    assert bench.asked.fields == fields
    assert [part.content for part in bench.asked.parts if part.filename] == [MP3]


async def test_a_streamed_transcript_is_paid_by_its_last_event(bench: Bench) -> None:
    pieces = [{"type": "transcript.text.delta", "delta": word} for word in ("Hel", "lo", "!")]
    done = {"type": "transcript.text.done", "text": "Hello!", "usage": token_usage(10, 30, 4)}
    bench.upstream.script = streams(*map(event, pieces), event(done))
    async with bench.charging(token_cost(10, 30, 4)):
        stream = await bench.client.audio.transcriptions.create(model=TOKENS, file=MP3, stream=True)
        events = [one async for one in stream]
    assert [one.type for one in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    usage = events[-1].usage.model_dump()  # type: ignore[union-attr]
    assert Decimal(usage["credits"]["cost"]) == token_cost(10, 30, 4)
    assert dict(bench.asked.fields)["stream"] == "true"


async def test_who_leaves_a_streamed_transcript_pays_for_the_recording(bench: Bench) -> None:
    gate = asyncio.Event()
    delta = event({"type": "transcript.text.delta", "delta": "Hello"})
    bench.upstream.script = streams(delta, event({"type": "transcript.text.done", "text": "Hello"}), held=gate)
    async with bench.charging(by_ms(likely_ms(MP3))):
        stream = await bench.client.audio.transcriptions.create(model=WHISPER, file=MP3, stream=True)
        assert (await anext(aiter(stream))).type == "transcript.text.delta"
        await stream.close()
    gate.set()


async def test_a_transcript_that_breaks_off_is_not_paid_for(bench: Bench) -> None:
    bench.upstream.script = streams(event({"type": "transcript.text.delta", "delta": "Hello"}))  # a clean end too early
    async with bench.charging(0):
        stream = await bench.client.audio.transcriptions.create(model=WHISPER, file=MP3, stream=True)
        with pytest.raises(openai.APIError) as failure:
            async for _ in stream:
                pass
    assert failure.value.code == "upstream_unavailable"


@pytest.mark.parametrize(
    ("fields", "script", "status"),
    [
        ({}, says({"error": {"message": "no"}}), 502),
        ({"response_format": "text"}, says({"error": {"message": "no"}}), 502),
        ({}, gives(b"Hello", "text/plain"), 502),
        ({"response_format": "srt"}, gives(b"\xff\xfe", "text/plain"), 502),
        ({}, says({"error": {"message": "no"}}, 400), 400),
        ({}, says({"text": 7}), 502),
    ],
    ids=range(6),
)
async def test_an_answer_that_is_none_is_not_paid_for(bench: Bench, fields: Any, script: Any, status: int) -> None:
    async with bench.charging(0):
        answer = await transcribe(bench, MP3, script, **fields)
    assert answer.status == status


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"response_format": "xml"}, "response_format"), ({"temperature": "warm"}, "temperature"),
     ({"stream": "yes"}, "stream"), ({"stream": "1"}, "stream"), ({"model": "nobody"}, "model"),
     ({"file[]": "https://x.example/a.mp3"}, "file"), ({"seconds": "1"}, "seconds"), ({"model": TTS}, "model"),
     ({"response_format[]": "text"}, "response_format"), ({"path": "/audio/translations", "stream": "true"}, "stream")],
    ids=str,
)  # fmt: skip
async def test_a_recording_that_cannot_be_priced_is_refused(bench: Bench, fields: dict[str, str], param: str) -> None:
    seen = len(bench.upstream.asked)
    answer = await transcribe(bench, MP3, None, **{"model": WHISPER, **fields})
    assert (answer.status, answer.error["param"]) == (404 if fields.get("model") == "nobody" else 400, param)
    assert len(bench.upstream.asked) == seen


async def test_two_recordings_are_refused_and_none_too(bench: Bench) -> None:
    file = ("file", "a.mp3", "audio/mpeg", MP3)
    for files in ([], [file, file]):
        answer = await bench.ask_form("/audio/transcriptions", [("model", WHISPER)], files)
        assert (answer.status, answer.error["param"]) == (400, "file")


async def test_who_cannot_pay_for_the_longest_that_it_can_be_is_refused(bench: Bench) -> None:
    key = new_account(bench.gateway, "short-of-breath", "small")
    seen = len(bench.upstream.asked)
    answer = await bench.ask_form(
        "/audio/transcriptions", [("model", WHISPER)], [("file", "a.mp3", "audio/mpeg", MP3 * 100)], key=key
    )
    assert (answer.status, answer.error["code"]) == (402, "request_exceeds_balance")
    assert len(bench.upstream.asked) == seen


async def test_a_form_is_charged_once_for_its_idempotency_key(bench: Bench) -> None:
    bench.upstream.script = says({"text": "Hello!", "duration": 1})
    seen = len(bench.upstream.asked)

    async def send(content: bytes) -> Answer:
        body, content_type = form([("model", WHISPER)], [("file", "a.mp3", "audio/mpeg", content)])
        headers = {"Authorization": f"Bearer {bench.key}", "Content-Type": content_type, "Idempotency-Key": "one"}
        url = f"{bench.gateway.base_url}/audio/transcriptions"
        async with bench.session.post(url, data=body, headers=headers) as answer:
            return Answer(answer.status, answer.headers.copy(), await answer.read())

    async with bench.charging(by_ms(1000)):
        statuses = [(await send(MP3)).status, (await send(MP3)).status, (await send(MP3 + b"x")).status]
    assert statuses == [200, 409, 422]
    assert len(bench.upstream.asked) == seen + 1


# --- uploads ---------------------------------------------------------------------------------------------------------


def upload_files(pid: int) -> list[str]:
    """Files without a name that the process has open."""
    links = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return [str(link) for link in links if "(deleted)" in str(link)]


async def test_a_large_upload_arrives_whole_and_is_never_in_memory(bench: Bench) -> None:
    file = random.Random(4).randbytes(40 * 2**20)
    await transcribe(bench, MP3, says({"text": "x", "duration": 1}))
    before = forget_peak(bench.gateway)
    async with bench.charging(by_ms(3_600_000)):
        answer = await transcribe(bench, file, says({"text": "Hello!", "duration": 3600}), language="en")
    assert answer.status == 200
    assert peak_bytes(bench.gateway) - before < 16 * 2**20
    sent = next(part for part in bench.asked.parts if part.filename)
    assert sent.content == file
    assert bench.asked.fields == [("model", WHISPER), ("language", "en")]
    assert bench.asked.headers["Content-Length"] == str(len(bench.asked.body))
    assert upload_files(bench.gateway.pid) == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upload_over_the_limit_is_refused(bench: Bench, chunked: bool) -> None:
    seen = len(bench.upstream.asked)
    body, content_type = form([("model", WHISPER)], [("file", "a.mp3", "audio/mpeg", bytes(UPLOAD_MIB * 2**20))])

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**20):
            yield body[start : start + 2**20]

    headers = {"Authorization": f"Bearer {bench.key}", "Content-Type": content_type}
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=pieces() if chunked else io.BytesIO(body), headers=headers) as answer:
        assert answer.status == 413
        assert (await answer.json())["error"]["code"] == "request_too_large"
    assert len(bench.upstream.asked) == seen
    assert upload_files(bench.gateway.pid) == []
    assert not bench.funds.held


async def test_a_client_that_hangs_up_in_its_upload_leaves_nothing(bench: Bench) -> None:
    seen = len(bench.upstream.asked)
    body, content_type = form([("model", WHISPER)], [("file", "a.mp3", "audio/mpeg", bytes(4 * 2**20))])
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bench.gateway.base_url.split(":")[2].split("/")[0]))
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bench.key}\r\n"
    head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: 2 * 2**20])
    await writer.drain()
    async with asyncio.timeout(20):
        while not upload_files(bench.gateway.pid):
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while upload_files(bench.gateway.pid):
            await asyncio.sleep(0.01)
    assert await reader.read() == b""
    assert not bench.funds.held
    assert bench.gateway.cli("reservations", "list")["data"] == []
    assert len(bench.upstream.asked) == seen


def part(head: bytes, content: bytes = b"x") -> bytes:
    return b"--" + BOUNDARY.encode() + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


END = b"--" + BOUNDARY.encode() + b"--\r\n"
NAMED = b'Content-Disposition: form-data; name="model"'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing like a form",
        END,
        part(NAMED, WHISPER.encode()),  # no end
        part(b"Content-Type: text/plain") + END,
        part(b"Content-Disposition: form-data") + END,
        part(b'Content-Disposition: form-data; name=""') + END,
        part(b'Content-Disposition: form-data; name="mo del"') + END,
        part(b'Content-Disposition: form-data; name="a\r\nX-Injected: 1"') + END,
        part(b'Content-Disposition: form-data; name="model', b"x") + END,
        part(b"Content-Disposition: attachment; \xff=1; name") + END,
        part(NAMED + b"\r\nContent-Transfer-Encoding: base64", b"d2hpc3Blcg==") + END,
        part(NAMED + b"\r\nContent-Encoding: gzip") + END,
        part(NAMED + b"\r\nContent-Type: multipart/mixed; boundary=b", b"--b\r\n\r\nx\r\n--b--") + END,
        part(NAMED, b"\xff\xfe") + END,
        part(b"X: " + b"x" * 100_000) + END,
        part(b"\r\n".join(b"X%d: y" % number for number in range(500)) + b"\r\n" + NAMED) + END,
        part(b'Content-Disposition: form-data; name="user"') * 10_000 + END,
        part(NAMED, b"x" * (2**20 + 1)) + END,
        b"\r\n" * 100_000 + part(NAMED, WHISPER.encode()) + END,
    ],
    ids=range(20),
)
async def test_a_broken_form_is_refused(bench: Bench, body: bytes) -> None:
    seen = len(bench.upstream.asked)
    headers = {"Authorization": f"Bearer {bench.key}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=io.BytesIO(body), headers=headers) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_body"
    assert len(bench.upstream.asked) == seen
    assert upload_files(bench.gateway.pid) == []
    assert not bench.funds.held


async def test_what_a_client_writes_in_a_broken_form_is_not_kept(bench: Bench) -> None:
    headers = {"Authorization": f"Bearer {bench.key}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    body = part(b"Content-Disposition: form-data; remember-me-for-ever") + END
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=body, headers=headers) as answer:
        assert answer.status == 400
    assert "remember-me-for-ever" not in bench.gateway.stderr


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "text/plain", "multipart/mixed; boundary=x", "multipart/form-data",
     f"multipart/form-data; boundary={'x' * 100}", "multipart/form-data; x=\udcff"],
    ids=range(6),
)  # fmt: skip
async def test_what_is_no_form_is_refused(bench: Bench, content_type: str) -> None:
    port = int(bench.gateway.base_url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bench.key}\r\n"
    head += f"Connection: close\r\nContent-Type: {content_type}\r\nContent-Length: 2\r\n\r\n{{}}"
    writer.write(head.encode(errors="surrogateescape"))
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert said.startswith(b"HTTP/1.1 400 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_body"


@pytest.mark.parametrize(
    "written",
    [b'filename="a\\"; name=\\"n.mp3"', b'filename="\xff\xfe.mp3"', b"filename*=utf-8''a%0D%0AX-Injected%3A%201",
     b"filename*=unicode_escape''%5Cud800.mp3", b'filename="a.mp3\x00"', b'filename="' + b"x" * 5000 + b'"'],
    ids=range(6),
)  # fmt: skip
async def test_a_filename_can_write_nothing_else_into_the_form(bench: Bench, written: bytes) -> None:
    bench.upstream.script = says({"text": "Hello!", "duration": 1})
    seen = len(bench.upstream.asked)
    body = part(NAMED, WHISPER.encode())
    body += part(b'Content-Disposition: form-data; name="file"; ' + written + b"\r\nContent-Type: a/b\x80", MP3) + END
    headers = {"Authorization": f"Bearer {bench.key}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    url = f"{bench.gateway.base_url}/audio/transcriptions"
    async with bench.session.post(url, data=body, headers=headers) as answer:
        assert answer.status in (200, 400)
        if answer.status == 400:
            assert len(bench.upstream.asked) == seen
            return
    model, file = bench.asked.parts
    assert (model.name, model.content) == ("model", WHISPER.encode())
    assert (file.name, file.content_type, file.content) == ("file", "application/octet-stream", MP3)
    assert file.filename is not None
    assert len(file.filename) <= 255
    assert b"\r\nX-Injected" not in bench.asked.body


# --- speech ----------------------------------------------------------------------------------------------------------


def by_characters(count: int) -> Decimal:
    return nano(count * CHARACTER / 1_000_000)


SOUND = random.Random(5).randbytes(3_000_000)


def pieces_of(sound: bytes, size: int = 65_536) -> list[bytes]:
    return [sound[start : start + size] for start in range(0, len(sound), size)]


async def test_speech_costs_its_characters_and_comes_as_it_is(bench: Bench) -> None:
    said = "Grüße, 世界 👋"
    bench.upstream.script = streams(*pieces_of(SOUND), content_type="audio/mpeg")
    async with bench.charging(by_characters(len(said))):
        async with bench.client.audio.speech.with_streaming_response.create(
            model=TTS, voice="alloy", input=said, instructions="slowly"
        ) as answer:
            sound = b"".join([piece async for piece in answer.iter_bytes()])
        assert answer.headers["Content-Type"] == "audio/mpeg"
        assert Decimal(answer.headers["x-credits-reserved"]) == by_characters(len(said))
    assert sound == SOUND
    assert bench.asked.document == {"model": TTS, "voice": "alloy", "input": said, "instructions": "slowly"}


async def test_short_speech_says_what_it_cost(bench: Bench) -> None:
    answer = await bench.ask("/audio/speech", {"model": TTS, "input": "Hi!", "voice": "x"}, gives(b"ID3", "audio/mpeg"))
    assert (answer.status, answer.body, answer.cost) == (200, b"ID3", by_characters(3))
    assert answer.headers["Content-Length"] == "3"


async def test_speech_may_be_charged_by_tokens(bench: Bench) -> None:
    body = {"model": TTS_TOKENS, "input": "Hello!", "voice": "x"}
    answer = await bench.ask("/audio/speech", body, gives(b"ID3", "audio/mpeg"))
    given = -(-len(json.dumps(body, separators=(",", ":"))) // 4)
    assert answer.cost == nano((given * TEXT_IN + 12 * AUDIO_OUT) / 1_000_000)


async def test_speech_in_events_is_paid_by_their_usage(bench: Bench) -> None:
    delta = {"type": "speech.audio.delta", "audio": "QUJD" * 10_000}
    usage = {"input_tokens": 14, "output_tokens": 101, "total_tokens": 115}
    done = {"type": "speech.audio.done", "usage": usage}
    sent = event(delta) + event(delta) + event(done)
    body = {"model": TTS_TOKENS, "input": "Hello!", "voice": "x", "stream_format": "sse"}
    cost = nano((14 * TEXT_IN + 101 * AUDIO_OUT) / 1_000_000)
    async with bench.charging(cost):
        answer = await bench.ask("/audio/speech", body, streams(sent[:50], sent[50:]))
    assert answer.body.startswith(event(delta) * 2)
    last = json.loads(answer.body.removeprefix(event(delta) * 2).partition(b"data: ")[2])
    assert Decimal(last["usage"].pop("credits")["cost"]) == cost
    del last["usage"]["cost"]
    assert last == done


async def test_a_client_that_reads_slowly_stops_the_upstream(bench: Bench) -> None:
    """Sound waits where it is made, not in the gateway's memory."""
    sent = 0
    ended = asyncio.Event()

    async def script(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
        await response.prepare(request)
        try:
            for _ in range(1024):
                await response.write(SOUND[:65_536])
                sent += 65_536
        finally:
            ended.set()
        return response

    bench.upstream.script = script
    await transcribe(bench, MP3, says({"text": "x", "duration": 1}))
    bench.upstream.script = script
    before = forget_peak(bench.gateway)
    body = {"model": TTS, "input": "Hello!", "voice": "x"}
    headers = {"Authorization": f"Bearer {bench.key}"}
    url = f"{bench.gateway.base_url}/audio/speech"
    async with bench.charging(by_characters(6)):
        async with bench.session.post(url, json=body, headers=headers) as answer:
            await answer.content.readexactly(65_536)
            stood = -1
            async with asyncio.timeout(30):
                while stood != sent:  # until nothing moves any more
                    stood = sent
                    await asyncio.sleep(0.3)
            assert sent < 1024 * 65_536
            assert peak_bytes(bench.gateway) - before < 16 * 2**20
        await ended.wait()


async def test_sound_that_breaks_off_has_no_clean_end_and_costs_nothing(bench: Bench) -> None:
    body = {"model": TTS, "input": "Hello!", "voice": "x"}
    bench.upstream.script = streams(*pieces_of(SOUND)[:20], content_type="audio/mpeg", breaks=True)
    async with bench.charging(0):
        with pytest.raises(ClientPayloadError):
            await bench.ask("/audio/speech", body, bench.upstream.script)


async def test_who_leaves_in_mid_sound_pays_for_all_of_it(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.upstream.script = streams(*pieces_of(SOUND)[:20], b"the end", content_type="audio/mpeg", held=gate)
    body = {"model": TTS, "input": "Hello!", "voice": "x"}
    headers = {"Authorization": f"Bearer {bench.key}"}
    url = f"{bench.gateway.base_url}/audio/speech"
    async with bench.charging(by_characters(6)), bench.session.post(url, json=body, headers=headers) as answer:
        await answer.content.readexactly(65_536)
        answer.close()
    gate.set()


@pytest.mark.parametrize(
    ("script", "status"),
    [(says({"error": {"message": "no voice"}}), 502), (says({"error": {"message": "no voice"}}, 400), 400),
     (says({"error": {"message": "no voice"}}, 503), 503), (gives(b"", "audio/mpeg"), 502),
     (gives(b'{"error": {"message": "no voice"}}', "audio/mpeg"), 502), (gives(b"", "audio/mpeg", 302), 502)],
    ids=range(6),
)  # fmt: skip
async def test_speech_that_is_none_costs_nothing(bench: Bench, script: Any, status: int) -> None:
    async with bench.charging(0):
        answer = await bench.ask("/audio/speech", {"model": TTS, "input": "Hello!", "voice": "x"}, script)
    assert answer.status == status
    assert isinstance(answer.error["message"], str)


async def test_sound_that_was_packed_all_the_same_arrives_whole(bench: Bench) -> None:
    async def script(_: web.Request) -> web.Response:
        response = web.Response(body=b"sound" * 1000, content_type="audio/mpeg")
        response.enable_compression(web.ContentCoding.gzip)
        return response

    answer = await bench.ask("/audio/speech", {"model": TTS, "input": "Hello!", "voice": "x"}, script)
    assert answer.body == b"sound" * 1000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x"]}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"stream_format": "wav"}, "stream_format"),
        ({"model": WHISPER}, "model"),
        ({"stream": True}, "stream"),
    ],
    ids=str,
)
async def test_speech_that_cannot_be_priced_is_refused(bench: Bench, change: dict[str, Any], param: str) -> None:
    seen = len(bench.upstream.asked)
    answer = await bench.ask("/audio/speech", {"model": TTS, "input": "Hello!", "voice": "x"} | change)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert len(bench.upstream.asked) == seen


async def test_who_cannot_pay_for_all_characters_is_refused(bench: Bench) -> None:
    key = new_account(bench.gateway, "short-of-words", "small")
    seen = len(bench.upstream.asked)
    answer = await bench.ask("/audio/speech", {"model": TTS, "input": "x" * 6667, "voice": "x"}, key=key)
    assert (answer.status, answer.error["code"]) == (402, "request_exceeds_balance")
    assert len(bench.upstream.asked) == seen
