"""An answer that is passed on as it comes, unread: sound, files, whatever a priced path gives. What it costs is known
before; it is charged once it is whole, or as soon as its reader has left it."""

import asyncio
import logging
import time

from aiohttp import web

from gateway.credits.reservations import Seen
from gateway.domain.metered import Metered
from gateway.http.browser import let_page_read
from gateway.http.exchange import Exchange, credit_headers
from gateway.http.holding import note_of
from gateway.http.quote import Quote
from gateway.http.settling import Settling
from gateway.http.writing import write, write_last
from gateway.upstream.client import DeadlinePassed, UpstreamAnswer, UpstreamError, UpstreamUnavailable

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
            last = await self._all_but_last(exchange, request, quote, answer)
            if not response.prepared and quote.api.read_answer(last) is None:
                raise UpstreamUnavailable("the answer is of no use")
            await self.charge(exchange, quote)
            if not response.prepared:
                await self._begin(exchange, request, quote, answer)
            await write_last(response, last)
        except (asyncio.CancelledError, ConnectionResetError):
            if response.prepared and not exchange.ended:
                await self.charge(exchange, quote)
            raise
        except UpstreamError as error:
            if not response.prepared:
                raise
            await self._break_off(exchange, request, quote, error)
        return response

    async def _all_but_last(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, answer: UpstreamAnswer
    ) -> bytes:
        """Pass on all but the last piece, which must wait for the charge."""
        response = exchange.response
        assert response is not None
        kept = b""
        async for piece in answer.chunks():
            if kept:
                if not response.prepared:
                    await self._begin(exchange, request, quote, answer)
                await write(request, response, kept)
            kept = piece
        return kept

    async def _begin(self, exchange: Exchange, request: web.BaseRequest, quote: Quote, answer: UpstreamAnswer) -> None:
        response, reservation = exchange.response, exchange.reservation
        assert response is not None
        assert reservation is not None
        response.headers.update(credit_headers(exchange))
        response.headers["Content-Type"] = answer.content_type_header
        for name in _KEPT_HEADERS:
            if name in answer.headers:
                response.headers[name] = answer.headers[name]
        if "Content-Encoding" in answer.headers:  # it was unpacked here, and is longer now
            response.headers.popall("Content-Length", None)
        let_page_read(exchange, response)
        reservation.look = lambda: self._seen(exchange, quote)  # it is paid for even if this gateway dies now
        exchange.first_byte = time.perf_counter()
        await response.prepare(request)

    def _seen(self, exchange: Exchange, quote: Quote) -> Seen:
        metered = _metered(quote)
        return Seen(quote.model.prices.femto(metered), note_of(exchange, quote.model, metered))

    async def charge(self, exchange: Exchange, quote: Quote) -> None:
        """Charge what the request costs, whatever came of it. Raises only what cancels."""
        await self._settling.charge(exchange, quote.model, quote.most_femto, _metered(quote))

    async def _break_off(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, error: UpstreamError
    ) -> None:
        """Nothing can be said in the middle of sound; but an end that is none must not look like one."""
        log.warning("%s: the upstream's answer broke: %s", exchange.id, error)
        if isinstance(error, DeadlinePassed) or exchange.body_broke:
            await self.charge(exchange, quote)  # no failure of the upstream's, which bills what it made
        exchange.reason = "upstream_unavailable"
        if request.transport is not None:
            request.transport.close()


def _metered(quote: Quote) -> Metered:
    read = quote.api.read_answer(b"\0")
    assert read is not None
    return read.metered(quote.ask, quote.bound)
