"""POST /images/generations, /images/edits and /images/variations: pictures of one colour, which a hash decides."""

import base64
import hashlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from gateway.demo.events import stream_events
from gateway.demo.fields import Body, boolean, check_model, integer, one_of, read_body, required_text
from gateway.demo.image_events import image_events
from gateway.demo.multipart import File, Form, read_form
from gateway.demo.png import png
from gateway.demo.refusal import Refused, as_json
from gateway.demo.words import count_tokens

MAX_N = 8
MAX_SIDE = 4096
MAX_PARTIAL = 3
MAX_INPUT_IMAGES = 16
MAX_PROMPT = 32_000

#: What an input picture and each picture in between count.
IMAGE_TOKENS, PARTIAL_TOKENS = 323, 100

_QUALITIES = ("auto", "low", "medium", "high", "standard", "hd")
_DRAWN_AS = {"auto": "medium", "standard": "medium", "hd": "high"}
_TOKENS_OF_QUALITY = {"low": 272, "medium": 1056, "high": 4160}  # of 1024x1024
_SIZE = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be drawn. seed: what decides the colour. quality: low, medium or high. partial: pictures before it.

    text_tokens, image_tokens: of the input.
    """

    seed: bytes
    n: int
    width: int
    height: int
    quality: str
    background: str
    as_url: bool
    stream: bool
    partial: int
    text_tokens: int
    image_tokens: int = 0

    @property
    def size(self) -> str:
        """In pixels."""
        return f"{self.width}x{self.height}"

    @property
    def usage(self) -> dict[str, Any]:
        """As gpt-image-1 counts: output by quality and by area."""
        each = math.ceil(_TOKENS_OF_QUALITY[self.quality] * self.width * self.height / 2**20)
        output = self.n * each + self.partial * PARTIAL_TOKENS
        given = self.text_tokens + self.image_tokens
        details = {"text_tokens": self.text_tokens, "image_tokens": self.image_tokens}
        return {
            "input_tokens": given,
            "input_tokens_details": details,
            "output_tokens": output,
            "total_tokens": given + output,
        }

    def draw(self, nth: int = 0) -> str:
        """The nth picture, as base64."""
        colour = hashlib.sha256(self.seed + bytes([nth])).digest()[:3]
        drawn = png(self.width, self.height, colour, transparent=self.background == "transparent")
        return base64.b64encode(drawn).decode()


async def generate(request: web.Request) -> web.StreamResponse:
    """Pictures for a prompt."""
    body = await read_body(request)
    prompt = required_text(body, "prompt", MAX_PROMPT)
    return await _answer(request, _order(body, prompt.encode(), count_tokens(prompt)), "image_generation")


async def edit(request: web.Request) -> web.StreamResponse:
    """Pictures for a prompt and other pictures, which nobody looks at."""
    form = await _form(request)
    prompt = required_text(dict(form.texts), "prompt", MAX_PROMPT)
    pictures = [*_pictures(form), *form.files.get("mask", [])]
    order = _order(_fields(form), prompt.encode(), count_tokens(prompt), pictures)
    return await _answer(request, order, "image_edit")


async def vary(request: web.Request) -> web.StreamResponse:
    """Pictures for another picture. As in OpenAI's answer, there is no usage."""
    form = await _form(request)
    order = _order(_fields(form), b"", 0, _pictures(form)[:1])
    return as_json({"created": int(time.time()), "data": _data(order)})


async def _answer(request: web.Request, order: Order, kind: str) -> web.StreamResponse:
    # As gpt-image-1 does, it says what it took each setting for.
    settings = {"size": order.size, "quality": order.quality, "background": order.background, "output_format": "png"}
    if order.stream:
        return await stream_events(request, image_events(kind, settings, order.draw(), order.partial, order.usage))
    return as_json({"created": int(time.time()), **settings, "data": _data(order), "usage": order.usage})


def _data(order: Order) -> list[Body]:
    drawn = [order.draw(nth) for nth in range(order.n)]
    return [{"url": f"data:image/png;base64,{each}"} if order.as_url else {"b64_json": each} for each in drawn]


async def _form(request: web.Request) -> Form:
    form = await read_form(request)
    check_model(request, form.texts.get("model"))
    return form


def _pictures(form: Form) -> list[File]:
    found = [*form.files.get("image", []), *form.files.get("image[]", [])]
    if not 1 <= len(found) <= MAX_INPUT_IMAGES:
        raise Refused(f"image must be a file, or at most {MAX_INPUT_IMAGES}", "image")
    return found


def _fields(form: Form) -> Mapping[str, Any]:
    """The form's texts as the types that JSON would have."""
    numbers = {"n": form.number("n", MAX_N, 1), "partial_images": form.number("partial_images", MAX_PARTIAL, 0)}
    return {**form.texts, **numbers, "stream": form.is_true("stream")}


def _order(fields: Mapping[str, Any], seed: bytes, text_tokens: int, pictures: list[File] | None = None) -> Order:
    body = dict(fields)
    quality = one_of(body, "quality", _QUALITIES)
    one_of(body, "output_format", ("png",))
    background = one_of(body, "background", ("auto", "opaque", "transparent"))
    width, height = _size(body)
    order = Order(
        seed=seed,
        n=integer(body, "n", MAX_N) or 1,
        width=width,
        height=height,
        quality=_DRAWN_AS.get(quality, quality),
        background="transparent" if background == "transparent" else "opaque",
        as_url=one_of(body, "response_format", ("b64_json", "url")) == "url",
        stream=boolean(body, "stream"),
        partial=integer(body, "partial_images", MAX_PARTIAL, 0) or 0,
        text_tokens=text_tokens,
    )
    if order.n > 1 and order.stream:
        raise Refused("a stream has one picture", "n")
    given = pictures or []
    return replace(
        order,
        partial=order.partial if order.stream else 0,
        seed=seed + b"".join(file.digest for file in given),
        image_tokens=IMAGE_TOKENS * len(given),
    )


def _size(body: Body) -> tuple[int, int]:
    value = body.get("size")
    if value in (None, "auto"):
        return 1024, 1024
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise Refused(f"size must be auto or WIDTHxHEIGHT, each at most {MAX_SIDE}", "size")
    return width, height
