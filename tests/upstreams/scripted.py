"""An upstream that answers as the test says, and keeps all that it was asked."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from multidict import CIMultiDictProxy

from tests.upstreams.local import LocalUpstream

#: How to answer a request whose body has been read.
Script = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Part:
    """A part of a form. filename: None for a text field."""

    name: str
    filename: str | None
    content_type: str | None
    content: bytes


@dataclass(frozen=True)
class Asked:
    """A request, read to its end. target: the path below /v1 with its query, as it was sent."""

    method: str
    target: str
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> list[Part]:
        """The form's parts, in order."""
        kind, _, boundary = self.headers["Content-Type"].partition("; boundary=")
        assert kind == "multipart/form-data"
        mark = f"--{boundary}".encode()
        first, *pieces, last = self.body.split(mark)
        assert (first, last) == (b"", b"--\r\n")
        return [_part(piece) for piece in pieces]

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The form's text fields, in order."""
        return [(part.name, part.content.decode()) for part in self.parts if part.filename is None]


def _part(piece: bytes) -> Part:
    head, _, content = piece.partition(b"\r\n\r\n")
    lines = dict(line.split(": ", 1) for line in head.decode().strip().split("\r\n"))
    words = dict(word.split("=", 1) for word in lines["Content-Disposition"].split("; ")[1:])
    filename = words.get("filename")
    plain = None if filename is None else filename[1:-1]
    return Part(words["name"][1:-1], plain, lines.get("Content-Type"), content.removesuffix(b"\r\n"))


class ScriptedUpstream(LocalUpstream):
    """Answers all paths by ``script``. asked: what came, whole, in order of arrival.

    early: answer before the body has been read; what comes of it is the script's own affair then.
    """

    def __init__(self) -> None:
        super().__init__(web.route("*", "/v1/{path:.*}", self._answer))
        self.script: Script = says({})
        self.asked: list[Asked] = []
        self.early = False
        self._arrived = asyncio.Condition()

    async def wait_for(self, count: int) -> None:
        """Return once count requests have arrived. Raises TimeoutError after 20 s."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.asked) >= count)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        script = self.script
        body = b"" if self.early else b"".join([piece async for piece in request.content.iter_any()])
        target = request.raw_path.removeprefix("/v1")
        async with self._arrived:
            self.asked.append(Asked(request.method, target, request.headers, body))
            self._arrived.notify_all()
        return await script(request)


def says(document: Any, status: int = 200, **headers: str) -> Script:
    """A JSON answer."""
    return gives(json.dumps(document).encode(), "application/json", status, **headers)


def gives(body: bytes, content_type: str, status: int = 200, **headers: str) -> Script:
    """Any whole answer."""

    async def script(_: web.Request) -> web.Response:
        return web.Response(body=body, status=status, headers={"Content-Type": content_type, **headers})

    return script


def event(document: dict[str, Any]) -> bytes:
    """An event as OpenAI writes those of media: with its type as its name."""
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()


def streams(
    *pieces: bytes, content_type: str = "text/event-stream", breaks: bool = False, held: asyncio.Event | None = None
) -> Script:
    """Pieces, written one by one. held: waited for before the last. breaks: the connection ends in mid-answer."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for number, piece in enumerate(pieces):
            if held is not None and number == len(pieces) - 1:
                await held.wait()
            await response.write(piece)
            await asyncio.sleep(0)
        if breaks:
            assert request.transport is not None
            request.transport.close()
        return response

    return script
