"""POST /audio/speech: a tone for each letter, as it is made."""

import asyncio
import base64
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.demo.events import event, stream, stream_events
from gateway.demo.fields import one_of, read_body, required_text
from gateway.demo.sound import CHARACTER_MS, RATE, SAMPLE_BYTES, tone, wav_header
from gateway.demo.words import TOKEN_SECONDS, count_tokens, split_tokens

MAX_INPUT = 4096

#: An output token is so long.
TOKEN_MS = 50

# All but wav and pcm it cannot make. It sends WAV instead, and the Content-Type says so: clients that name no format
# mean mp3.
_FORMATS = ("mp3", "wav", "pcm", "opus", "aac", "flac")


async def speak(request: web.Request) -> web.StreamResponse:
    """The sound of a text, in pieces of a token; pcm is without the header of a WAV."""
    body = await read_body(request)
    text = required_text(body, "input", MAX_INPUT)
    plain = one_of(body, "response_format", _FORMATS) == "pcm"
    pieces = _pieces(text, plain=plain)
    if one_of(body, "stream_format", ("audio", "sse")) == "sse":
        return await stream_events(request, _events(text, pieces))
    return await stream(request, pieces, "audio/pcm" if plain else "audio/wav")


async def _pieces(text: str, *, plain: bool) -> AsyncIterator[bytes]:
    if not plain:
        yield wav_header(len(text) * RATE * CHARACTER_MS // 1000 * SAMPLE_BYTES)
    for token in split_tokens(text):
        yield tone(token)
        await asyncio.sleep(TOKEN_SECONDS)


async def _events(text: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
    given, made = count_tokens(text), -(-len(text) * CHARACTER_MS // TOKEN_MS)
    usage = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
    yield event({"type": "speech.audio.done", "usage": usage})
