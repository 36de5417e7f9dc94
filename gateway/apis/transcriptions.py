"""POST /audio/transcriptions and /audio/translations: a recording in, its text out, paid by the second or by tokens."""

import re
from decimal import Decimal
from typing import Any

import orjson

from gateway.apis.api import Api
from gateway.apis.audio_length import is_exact, likely_ms, most_ms
from gateway.apis.fields import EVERYWHERE, boolean, only, text
from gateway.apis.form import files_of
from gateway.apis.media import MediaStream, billed_media, read_media_usage
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import BYTES_PER_TOKEN, Ask, Bound, InvalidRequest
from gateway.domain.value import value
from gateway.upstream.usage import Answer, Usage

#: Tokens of a second of speech, as models that count them do. Only used where no upstream told the tokens.
TOKENS_PER_S = 10

_TIMED = re.compile(r"(?:(\d{1,4}):)?(\d\d):(\d\d)[,.](\d{3})\s*-->\s*(?:(\d{1,4}):)?(\d\d):(\d\d)[,.](\d{3})")
_DOCUMENTS = ("json", "verbose_json", "diarized_json")
_TEXTS = ("text", "srt", "vtt")


@value(frozen=True, slots=True)
class Transcript(Answer):
    """A whole answer. audio_ms: how long the recording is, as it says; None where it does not."""

    audio_ms: int | None = None

    def metered(self, ask: Ask, bound: Bound) -> Metered:
        """By the recording's length, and by tokens. One that holds no words was listened to all the same."""
        if self.empty and self.audio_ms is None and self.usage is None and not ask.exact_audio:
            return Metered()
        return metered_transcript(self.usage, ask, bound, self.audio_ms, self.content_bytes)


class Transcriptions(Api):
    """The text in the language that is spoken."""

    path = "/audio/transcriptions"
    name = "transcription"
    operation = "transcription"
    takes_form = True
    typed_fields = frozenset({"temperature", "stream"})
    fields = EVERYWHERE | frozenset(
        "file language prompt response_format temperature timestamp_granularities include stream "
        "chunking_strategy".split()
    )

    def check_sold(self, ask: Ask, model: Model) -> None:
        """By the second, by tokens or by the request."""
        prices = model.prices
        if prices.tokens is None and prices.audio_ms_femto is None and prices.request_femto is None:
            raise self.unsold(ask)

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> "TranscriptStream":
        """The text as it is understood."""
        return TranscriptStream(ask, bound, rule)

    def answer_to(self, ask: Ask, body: bytes) -> Transcript | None:
        """Text where text was asked for, else a document."""
        if ask.answer_format not in _TEXTS or _is_error(body):
            return self.read_answer(body)
        return read_text(body, timed=ask.answer_format != "text" and not ask.exact_audio)

    def read_answer(self, body: bytes) -> Transcript | None:
        """A document with a text."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(document, dict) or document.get("error") or not isinstance(document.get("text"), str):
            return None
        said = document["text"]
        usage = document.get("usage")
        return Transcript(
            read_media_usage(usage, input_is="audio"), len(said.encode(errors="replace")), len(said), said_ms(document)
        )

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        for name in ("language", "prompt"):
            text(body, name)
        only(body, "response_format", (*_DOCUMENTS, *_TEXTS))
        files = files_of(body, "file", 1)
        if not files:
            raise InvalidRequest("'file' is missing: send the recording as a file", "file")
        file = files[0]
        return Ask(
            self.operation,
            model,
            None,
            stream=boolean(body, "stream"),
            wants_usage=True,
            units=Metered(audio_ms=most_ms(file.head, file.size_bytes), requests=1),
            indivisible=True,
            likely_audio_ms=likely_ms(file.head, file.size_bytes),
            exact_audio=is_exact(file.head),
            answer_format=body.get("response_format") or "json",
        )


class Translations(Transcriptions):
    """The text in English."""

    path = "/audio/translations"
    name = "translation"
    fields = EVERYWHERE | frozenset({"file", "prompt", "response_format", "temperature"})


class TranscriptStream(MediaStream):
    """Pieces of the text, and the whole text with the usage at the end."""

    last_types = frozenset({"transcript.text.done"})

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._audio_ms: int | None = None
        self._bytes = 0

    def metered(self, *, complete: bool) -> Metered:
        """The whole recording, however much of its text was handed out: it was all given to the upstream."""
        if not self.has_output:
            return Metered()
        return metered_transcript(self.usage, self._ask, self._bound, self._audio_ms, self._bytes)

    def _take(self, document: dict[str, Any]) -> None:
        self.usage = read_media_usage(document.get("usage"), input_is="audio") or self.usage
        told_ms = said_ms(document)
        self._audio_ms = self._audio_ms if told_ms is None else told_ms

    def _meet(self, block: bytes) -> None:
        self._bytes += len(block)  # as it stands in its events: only an estimate needs it


def read_text(body: bytes, *, timed: bool) -> Transcript | None:
    """An answer in plain text or subtitles (timed), of which the last tells the length; None for what is no text. Plain
    text tells none: what looks like a subtitle there was said."""
    try:
        said = body.decode()
    except UnicodeDecodeError:
        return None
    ends = [_moment_ms(match.groups()[4:]) for match in _TIMED.finditer(said)] if timed else []
    return Transcript(None, len(body), len(said), max(ends, default=None))


def _is_error(body: bytes) -> bool:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(document, dict) and bool(document.get("error"))


def said_ms(document: dict[str, Any]) -> int | None:
    """The recording's length as an answer says it, in seconds; None where it does not."""
    usage = document.get("usage")
    seconds = usage.get("seconds") if isinstance(usage, dict) else None
    if isinstance(seconds, float | int) and not isinstance(seconds, bool):
        return _rounded_up_ms(seconds)
    duration = document.get("duration")
    if isinstance(duration, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", duration):
        return _rounded_up_ms(Decimal(duration))
    if isinstance(duration, float | int) and not isinstance(duration, bool):
        return _rounded_up_ms(duration)
    return None


def metered_transcript(usage: Usage | None, ask: Ask, bound: Bound, audio_ms: int | None, text_bytes: int) -> Metered:
    """What to charge. audio_ms, usage: as the upstream told them; without them the likely length, and tokens by it."""
    length_ms = ask.likely_audio_ms if audio_ms is None else audio_ms
    spoken = -(-length_ms * TOKENS_PER_S // 1000)
    unreported = Metered(
        input=spoken, audio_input=spoken, output=-(-text_bytes // BYTES_PER_TOKEN), audio_ms=max(0, length_ms)
    )
    return billed_media(usage, ask, bound, unreported)


def _rounded_up_ms(seconds: float | Decimal) -> int | None:
    exact = Decimal(repr(seconds)) if isinstance(seconds, float) else Decimal(seconds)
    return -(-int(exact * 1_000_000) // 1000) if exact.is_finite() and 0 <= exact < 10**9 else None


def _moment_ms(parts: tuple[str | None, ...]) -> int:
    hours, minutes, seconds, thousandths = (int(part or 0) for part in parts)
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + thousandths
