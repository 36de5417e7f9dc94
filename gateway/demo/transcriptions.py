"""POST /audio/transcriptions and /audio/translations: nobody listens, but the length is true."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway.demo.events import event, stream_events
from gateway.demo.fields import check_model, one_of
from gateway.demo.multipart import Form, read_form
from gateway.demo.refusal import Refused, as_json
from gateway.demo.sound import seconds_of
from gateway.demo.words import LABEL, TOKEN_SECONDS, count_tokens, split_tokens

#: What a second of a file counts that is no WAV: as in an mp3 of 32 kbit/s.
OTHER_BYTES_PER_SECOND = 4_000
AUDIO_TOKENS_PER_SECOND = 10

_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


@dataclass(frozen=True, slots=True)
class _Heard:
    """text: what is answered. usage: by tokens if the model's name says "transcribe", else by whole seconds."""

    text: str
    seconds: float
    usage: dict[str, Any]


async def transcribe(request: web.Request) -> web.StreamResponse:
    """The length of a file in words, in each of the formats; whole or, as JSON, streamed."""
    form = await read_form(request)
    heard, form_of_answer = _heard(request, form), one_of(dict(form.texts), "response_format", _FORMATS)
    if form.is_true("stream"):
        if form_of_answer != "json":
            raise Refused("only json can be streamed", "response_format")
        return await stream_events(request, _events(heard))
    return _answer(heard, form_of_answer, "transcribe")


async def translate(request: web.Request) -> web.StreamResponse:
    """The same: its words are English. As in OpenAI's answer, there is no usage."""
    form = await read_form(request)
    heard, form_of_answer = _heard(request, form), one_of(dict(form.texts), "response_format", _FORMATS)
    return _answer(heard, form_of_answer, "translate")


def _heard(request: web.Request, form: Form) -> _Heard:
    model = check_model(request, form.texts.get("model"))
    files = form.files.get("file", [])
    if len(files) != 1 or not files[0].size:
        raise Refused("file must be one file, not an empty one", "file")
    [file] = files
    seconds = seconds_of(file.head, file.size, other_bytes_per_second=OTHER_BYTES_PER_SECOND)
    text = f"{LABEL} It did not listen. The sound is {seconds:.2f} seconds long."
    if "transcribe" not in model:
        return _Heard(text, seconds, {"type": "duration", "seconds": math.ceil(seconds)})
    asked, sound = count_tokens(form.texts.get("prompt", "")), math.ceil(seconds * AUDIO_TOKENS_PER_SECOND)
    said = count_tokens(text)
    usage = {
        "type": "tokens",
        "input_tokens": asked + sound,
        "input_token_details": {"text_tokens": asked, "audio_tokens": sound},
        "output_tokens": said,
        "total_tokens": asked + sound + said,
    }
    return _Heard(text, seconds, usage)


def _answer(heard: _Heard, form: str, task: str) -> web.Response:
    if form == "text":
        return web.Response(text=f"{heard.text}\n")
    if form == "srt":
        return web.Response(text=f"1\n{_time(0, ',')} --> {_time(heard.seconds, ',')}\n{heard.text}\n\n")
    if form == "vtt":
        return web.Response(text=f"WEBVTT\n\n{_time(0, '.')} --> {_time(heard.seconds, '.')}\n{heard.text}\n\n")
    usage = {"usage": heard.usage} if task == "transcribe" else {}
    if form == "json":
        return as_json({"text": heard.text, **usage})
    said = {"task": task, "language": "english", "duration": heard.seconds, "text": heard.text}
    return as_json({**said, "segments": [_segment(heard)], **usage})


def _segment(heard: _Heard) -> dict[str, Any]:
    return {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": heard.seconds,
        "text": heard.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }


def _time(seconds: float, point: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


async def _events(heard: _Heard) -> AsyncIterator[bytes]:
    for token in split_tokens(heard.text):
        yield event({"type": "transcript.text.delta", "delta": token})
        await asyncio.sleep(TOKEN_SECONDS)
    yield event({"type": "transcript.text.done", "text": heard.text, "usage": heard.usage})
