"""POST /images/generations in JSON, /images/edits and /images/variations in a form: pictures, paid by the picture, by
tokens, or both."""

import re
from typing import Any

import orjson

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, boolean, text, whole
from gateway.apis.form import files_of
from gateway.apis.media import MediaStream, billed_media, read_media_usage
from gateway.config.model import CountOutput
from gateway.domain.metered import Images, Metered
from gateway.domain.model import Model
from gateway.domain.price import AUTO
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.domain.value import value
from gateway.upstream.usage import Answer, Usage

MAX_IMAGES = 10
#: Pictures that an edit may start from.
MAX_GIVEN = 16
MAX_PARTIAL = 3

_SIZE = re.compile(r"auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
_QUALITY = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
# What every answer has in common with others of the same look; none of them changes what it costs.
_LOOKS = frozenset("prompt n size quality background output_format output_compression response_format".split())
_STREAMED = frozenset({"stream", "partial_images"})
_NUMBERS = frozenset({"n", "output_compression", "partial_images", "stream"})


@value(frozen=True, slots=True)
class Pictures(Answer):
    """A whole answer. count: pictures in it. size, quality: as it says; AUTO where it does not."""

    count: int = 0
    size: str = AUTO
    quality: str = AUTO

    def metered(self, ask: Ask, bound: Bound) -> Metered:
        """The pictures that came, and the tokens."""
        return _metered(self.usage, ask, bound, _kinds(ask, [(self.size, self.quality)] * self.count))


class Generations(Api):
    """A prompt in, up to ten pictures out."""

    path = "/images/generations"
    name = "image_generation"
    operation = "image_generation"
    fields = EVERYWHERE | _LOOKS | _STREAMED | frozenset({"style", "moderation", "seed", "negative_prompt"})

    def check_sold(self, ask: Ask, model: Model) -> None:
        """By the picture, which then must be of a kind that has a price, by tokens or by the request."""
        prices = model.prices
        if prices.tokens is None and prices.request_femto is None and not prices.images:
            raise self.unsold(ask)
        for images in ask.units.images if prices.images else ():
            if not prices.sells_image(images.size, images.quality):
                kind = f"size {images.size!r} and quality {images.quality!r}"
                raise InvalidRequest(f"the model {ask.model!r} has no price for an image of {kind}", "size")

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> "PicturesStream":
        """Pictures on their way."""
        return PicturesStream(ask, bound, rule)

    def read_answer(self, body: bytes) -> Pictures | None:
        """An answer with data."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(document, dict) or document.get("error"):
            return None
        data = document.get("data")
        pictures = [one for one in data if one] if isinstance(data, list) else []
        return Pictures(
            read_media_usage(document.get("usage"), output_is="image"),
            content_bytes=len(pictures),
            characters=0,
            count=len(pictures),
            size=_said(document, "size", _SIZE),
            quality=_said(document, "quality", _QUALITY),
        )

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        if not text(body, "prompt"):
            raise InvalidRequest("'prompt' must be a string, and not an empty one", "prompt")
        return self._asked(body, model, 0)

    def _asked(self, body: dict[str, Any], model: str, input_bytes: int | None) -> Ask:
        count = whole(body, "n", 1, MAX_IMAGES) or 1
        whole(body, "partial_images", 0, MAX_PARTIAL)
        kind = Images(_asked(body, "size", _SIZE), _asked(body, "quality", _QUALITY), count)
        return Ask(
            self.operation,
            model,
            input_bytes,
            completions=count,
            stream=boolean(body, "stream"),
            wants_usage=True,
            units=Metered(images=(kind,), requests=1),
            indivisible=True,
        )


class Edits(Generations):
    """A prompt and pictures in, up to ten pictures out. What a given picture costs in tokens is known only later."""

    path = "/images/edits"
    name = "image_edit"
    fields = EVERYWHERE | _LOOKS | _STREAMED | frozenset({"image", "mask", "input_fidelity", "moderation", "seed"})
    takes_form = True
    typed_fields = _NUMBERS

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        if not text(body, "prompt"):
            raise InvalidRequest("'prompt' must be a string, and not an empty one", "prompt")
        files_of(body, "mask", 1)
        if not files_of(body, "image", MAX_GIVEN):
            raise InvalidRequest("'image' is missing: send it as a file", "image")
        return self._asked(body, model, None)


class Variations(Generations):
    """A picture in, up to ten like it out."""

    path = "/images/variations"
    name = "image_variation"
    fields = EVERYWHERE | frozenset({"image", "n", "size", "response_format"})
    takes_form = True
    typed_fields = _NUMBERS

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        if not files_of(body, "image", 1):
            raise InvalidRequest("'image' is missing: send it as a file", "image")
        return self._asked(body, model, None)


class PicturesStream(MediaStream):
    """Pictures, each in some previews first. Of whom the client saw anything, it pays for."""

    last_types = frozenset({"image_generation.completed", "image_edit.completed"})

    def __init__(self, ask: Ask, bound: Bound, rule: CountOutput = "chunks") -> None:
        super().__init__(ask, bound, rule)
        self._kinds: list[tuple[str, str]] = []
        self._events_of_whole = 0

    def metered(self, *, complete: bool) -> Metered:
        """The pictures that came, and the one that was only begun."""
        if not self.has_output:
            return Metered()
        has_more = not complete and self._count.events > self._events_of_whole
        begun = [(AUTO, AUTO)] if has_more else []
        return _metered(self.usage, self._ask, self._bound, _kinds(self._ask, self._kinds + begun))

    def _answers(self) -> int:
        return self._ask.completions

    def _take(self, document: dict[str, Any]) -> None:
        if document.get("type") in self.last_types:
            self._kinds.append((_said(document, "size", _SIZE), _said(document, "quality", _QUALITY)))
            self._events_of_whole = self._count.events
        usage = read_media_usage(document.get("usage"), output_is="image")
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage.plus(usage, same_prompt=True)


def _metered(usage: Usage | None, ask: Ask, bound: Bound, kinds: tuple[Images, ...]) -> Metered:
    count = min(sum(images.count for images in kinds), ask.completions)
    if not count:
        return Metered()
    made = count * bound.output_tokens_each
    unreported = Metered(input=bound.input_tokens, output=made, image_output=made, images=kinds)
    return billed_media(usage, ask, bound, unreported)


def _kinds(ask: Ask, said: list[tuple[str, str]]) -> tuple[Images, ...]:
    """Pictures by their kinds: as they were asked for, else as the upstream says, as many as were asked for at most."""
    asked = ask.units.images[0]
    counts: dict[tuple[str, str], int] = {}
    for size, quality in said[: asked.count]:
        kind = (size if asked.size == AUTO else asked.size, quality if asked.quality == AUTO else asked.quality)
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(Images(size, quality, count) for (size, quality), count in counts.items())


def _asked(body: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = text(body, name)
    if value is None:
        return AUTO
    if not pattern.fullmatch(value):
        raise InvalidRequest(f"{name!r} is no {name} of an image", name)
    return value


def _said(document: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = document.get(name)
    return value if isinstance(value, str) and pattern.fullmatch(value) else AUTO
