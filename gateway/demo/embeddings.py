"""POST /embeddings."""

import base64
import hashlib
import math
import struct

from aiohttp import web

from gateway.demo.fields import one_of, read_body, texts_or_ids
from gateway.demo.refusal import Refused, as_json

MAX_INPUTS = 2048
DIMENSIONS = 32


async def embed(request: web.Request) -> web.Response:
    """A unit vector for each input, which only a hash of it decides."""
    body = await read_body(request)
    encoding = one_of(body, "encoding_format", ("float", "base64"))
    inputs = texts_or_ids(body, "input", MAX_INPUTS)
    if not all(item.tokens for item in inputs):
        raise Refused("input must not be empty", "input")
    data = []
    for index, item in enumerate(inputs):
        vector = _unit_vector(item.text)
        packed = base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed if encoding == "base64" else vector})
    tokens = sum(item.tokens for item in inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "model": body["model"], "data": data, "usage": usage})


def _unit_vector(text: str) -> list[float]:
    # 16-bit halves of a hash, shifted by a half so that no vector is zero.
    digest = hashlib.shake_256(text.encode()).digest(2 * DIMENSIONS)
    raw = [number + 0.5 for number in struct.unpack(f"<{DIMENSIONS}h", digest)]
    length = math.hypot(*raw)
    return [number / length for number in raw]
