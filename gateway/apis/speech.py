"""POST /audio/speech: a text in, a voice out, paid by the character or by tokens.

The voice comes as sound, which says nothing of its cost, or as events, of which the last holds a usage.
"""

from typing import Any

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, only, text
from gateway.apis.media import MediaStream, billed_media, read_media_usage
from gateway.config.model import CountOutput
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import Ask, Bound, InvalidRequest, estimated_input
from gateway.upstream.usage import Answer

#: Tokens of sound that a character of text becomes at most, in speech of usual speed. Only used where no upstream told
#: the tokens.
TOKENS_PER_CHARACTER = 2


class Speech(Api):
    """All characters are paid for once any sound was handed out: the upstream was given all of them."""

    path = "/audio/speech"
    name = "speech"
    operation = "speech"
    passes_bytes = True
    fields = EVERYWHERE | frozenset("input voice instructions response_format speed stream_format".split())

    def check_sold(self, ask: Ask, model: Model) -> None:
        """By the character, by tokens or by the request."""
        prices = model.prices
        if prices.tokens is None and prices.character_femto is None and prices.request_femto is None:
            raise self.unsold(ask)

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> "SpeechStream":
        """Sound in events."""
        return SpeechStream(ask, bound, rule)

    def read_answer(self, body: bytes) -> Answer | None:
        """Whatever sound it is; JSON is none."""
        return _Sound(None, len(body), 0) if body and not body.startswith(b"{") else None

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        said = text(body, "input")
        if not said:
            raise InvalidRequest("'input' must be a string, and not an empty one", "input")
        text(body, "instructions")
        only(body, "stream_format", ("audio", "sse"))
        return Ask(
            self.operation,
            model,
            0,
            stream=body.get("stream_format") == "sse",
            wants_usage=True,
            units=Metered(characters=len(said), requests=1),
            indivisible=True,
        )


class _Sound(Answer):
    def metered(self, ask: Ask, bound: Bound) -> Metered:
        return _metered(ask, bound)


class SpeechStream(MediaStream):
    """Pieces of sound, and the usage at the end."""

    last_types = frozenset({"speech.audio.done"})

    def metered(self, *, complete: bool) -> Metered:
        """All of the text, however much of the sound was handed out."""
        if not self.has_output:
            return Metered()
        if self.usage is None:
            return _metered(self._ask, self._bound)
        return billed_media(self.usage, self._ask, self._bound, Metered())

    def _take(self, document: dict[str, Any]) -> None:
        self.usage = read_media_usage(document.get("usage"), output_is="audio") or self.usage


def _metered(ask: Ask, bound: Bound) -> Metered:
    spoken = TOKENS_PER_CHARACTER * ask.units.characters
    unreported = Metered(input=estimated_input(ask, bound), output=spoken, audio_output=spoken)
    return billed_media(None, ask, bound, unreported)
