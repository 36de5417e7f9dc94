"""An answer that is passed on as it comes, unread: sound, files, whatever a priced path gives. What it costs is known
before; it is charged once it is whole, or as soon as its reader has left it."""

import asyncio
import logging

from aiohttp import web

from gateway.http.browser import let_page_read
from gateway.http.exchange import Exchange, credit_headers
from gateway.http.quote import Quote
from gateway.http.relay import write
from gateway.http.settling import Settling
from gateway.upstream.client import DeadlinePassed, UpstreamAnswer, UpstreamError

log = logging.getLogger(__name__)

_KEPT_HEADERS = ("Content-Disposition", "Content-Length")


class Passing:
    """Passes answers on."""

    def __init__(self, settling: Settling) -> None:
        self._settling = settling

    async def pass_on(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, answer: UpstreamAnswer
    ) -> web.StreamResponse:
        """Hand the client what the upstream sends, and charge it.

        Raises UpstreamError where nothing was handed out yet, and ConnectionResetError where the client has hung up. A
        reservation that has not ended then is to be voided.
        """
        response = exchange.response = web.StreamResponse(status=answer.status)
        try:
            last = await self._all_but_last(exchange, request, response, answer)
            await self._charge(exchange, quote)
            if not response.prepared:
                await self._begin(exchange, request, response, answer)
            await write(response, last, last=True)
        except (asyncio.CancelledError, ConnectionResetError):
            if response.prepared and not exchange.ended:
                await self._charge(exchange, quote)
            raise
        except UpstreamError as error:
            if not response.prepared:
                raise
            await self._break_off(exchange, request, quote, error)
        return response

    async def _all_but_last(
        self, exchange: Exchange, request: web.BaseRequest, response: web.StreamResponse, answer: UpstreamAnswer
    ) -> bytes:
        """Pass on all but the last piece, which must wait for the charge."""
        kept = b""
        async for piece in answer.chunks():
            if kept:
                if not response.prepared:
                    await self._begin(exchange, request, response, answer)
                await write(response, kept)
            kept = piece
        return kept

    async def _begin(
        self, exchange: Exchange, request: web.BaseRequest, response: web.StreamResponse, answer: UpstreamAnswer
    ) -> None:
        response.headers.update(credit_headers(exchange))
        response.headers["Content-Type"] = answer.content_type_header
        for name in _KEPT_HEADERS:
            if name in answer.headers:
                response.headers[name] = answer.headers[name]
        let_page_read(exchange, response)
        await response.prepare(request)

    async def _charge(self, exchange: Exchange, quote: Quote) -> None:
        read = quote.api.read_answer(b"\0")
        assert read is not None
        await self._settling.charge(exchange, quote.model, quote.bound, read.metered(quote.ask, quote.bound))

    async def _break_off(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, error: UpstreamError
    ) -> None:
        """Nothing can be said in the middle of sound; but an end that is none must not look like one."""
        log.warning("%s: the upstream's answer broke: %s", exchange.id, error)
        if isinstance(error, DeadlinePassed):  # no failure of the upstream's, which bills what it made
            await self._charge(exchange, quote)
        exchange.status, exchange.reason = 502, "upstream_unavailable"
        if request.transport is not None:
            request.transport.close()
