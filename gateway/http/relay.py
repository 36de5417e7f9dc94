"""A streamed answer on its way from the upstream to the client, charged once whichever way it ends."""

import asyncio
import logging
import time

from aiohttp import web

from gateway.credits.errors import StoreError
from gateway.credits.service import CreditEngine
from gateway.domain.forecast import OutputForecast
from gateway.domain.value import value
from gateway.http import errors
from gateway.http.browser import let_page_read
from gateway.http.errors import Failure
from gateway.http.exchange import Exchange, cost_fields, credit_headers
from gateway.http.holding import CreditsEnded, StreamHold
from gateway.http.quote import Quote
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.http.writing import KEEPS_UP_BYTES, chunked_transport, write, write_last
from gateway.upstream.answer import Taker
from gateway.upstream.client import DeadlinePassed, UpstreamAnswer, UpstreamError
from gateway.upstream.sse import BrokenStream, EventStream, Overrun

log = logging.getLogger(__name__)


@value(frozen=True, slots=True)
class _Stream:
    """One stream, between its two ends."""

    exchange: Exchange
    request: web.BaseRequest
    quote: Quote
    answer: UpstreamAnswer
    events: EventStream
    response: web.StreamResponse


class StreamRelay:
    """Relays streams, as far as their credits go."""

    def __init__(self, engine: CreditEngine, settling: Settling, reports: Reports, forecast: OutputForecast) -> None:
        self._engine = engine
        self._settling = settling
        self._reports = reports
        self._forecast = forecast

    async def relay(
        self, exchange: Exchange, request: web.BaseRequest, quote: Quote, answer: UpstreamAnswer
    ) -> web.StreamResponse:
        """Hand the client what the upstream streams, and charge it. quote: as it was forwarded.

        Raises ConnectionResetError where the client has hung up. A reservation that has not ended then is to be voided.
        """
        upstream = exchange.config.upstreams[quote.model.upstream]
        events = exchange.events = quote.api.stream(quote.ask, quote.bound, upstream.count_output)
        response = exchange.response = web.StreamResponse(
            headers={
                **credit_headers(exchange),
                "Content-Type": answer.content_type_header,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        let_page_read(exchange, response)
        stream = _Stream(exchange, request, quote, answer, events, response)
        try:
            return await self._run(stream)
        except (asyncio.CancelledError, ConnectionResetError):
            # The client hung up: leaving the block stops the upstream; what was sent is paid for.
            if not exchange.ended and events.payable and not events.failed:
                await self._charge_as_seen(stream)
            raise

    async def _run(self, stream: _Stream) -> web.StreamResponse:
        exchange, events = stream.exchange, stream.events
        failure = await self._pass_on(stream)
        self._reports.watch_overrun(exchange, stream.quote, events.usage)
        if failure is None and events.failed and not events.error_shown:
            failure = errors.upstream_unavailable()
        if failure is not None:
            return await self._break_off(stream, failure)
        if not events.failed and not exchange.ended:
            self._learn(stream)
            quote = stream.quote
            await self._settling.charge(exchange, quote.model, quote.most_femto, events.metered(complete=True))
        if not stream.response.prepared:
            await stream.response.prepare(stream.request)
        await write_last(stream.response, events.closing(cost_fields(exchange.settlement)))
        return stream.response

    async def _pass_on(self, stream: _Stream) -> Failure | None:
        """Pass events on until the stream's end; why it broke, or None if it came to its end."""
        exchange, events = stream.exchange, stream.events
        hold = StreamHold(self._engine, exchange, stream.quote, events)
        try:
            await self._flow(stream, hold)
        except (UpstreamError, BrokenStream, TimeoutError, Overrun) as error:
            return await self._broken(stream, error)
        except CreditsEnded:
            self._learn(stream)
            await self._stop(stream)
            self._end_for_credits(stream)
            return None
        except StoreError as error:
            log.warning("%s: the stream was cut: its hold cannot be extended: %s", exchange.id, error)
            await self._stop(stream)
            return errors.store_lost(charged=events.payable)
        finally:
            hold.close()
        if events.done or events.complete or events.failed:
            return None
        log.warning("%s: the upstream's stream ended too early", exchange.id)
        return errors.upstream_unavailable()

    async def _broken(self, stream: _Stream, error: Exception) -> Failure | None:
        """What to say of a stream that was cut or broke; None where all of the answer had come."""
        exchange, events = stream.exchange, stream.events
        if events.complete:
            log.info("%s: the upstream did not end its stream: %s", exchange.id, error)
            return None
        if isinstance(error, Overrun):
            return await self._overran(stream)
        if isinstance(error, DeadlinePassed | TimeoutError):
            log.warning("%s: the stream was cut: %s", exchange.id, error or "it took longer than total_timeout")
            # No failure of the upstream's, which bills what it made: so is the client billed for what it got.
            await self._charge_as_seen(stream)
            return errors.deadline_passed(charged=events.payable)
        log.warning("%s: the upstream's stream broke: %s", exchange.id, error)
        return errors.upstream_failed(error)

    async def _overran(self, stream: _Stream) -> Failure | None:
        """End a stream whose upstream goes on beyond its limit: as credits do, if it was they that set it."""
        exchange, events = stream.exchange, stream.events
        log.error("%s: the upstream heeds no limit: %s", exchange.id, stream.quote.model.upstream)
        await self._stop(stream)
        if exchange.max_tokens is None:
            return errors.upstream_overran(charged=events.payable)
        self._end_for_credits(stream)
        return None

    def _end_for_credits(self, stream: _Stream) -> None:
        exchange = stream.exchange
        self._reports.truncated(exchange)
        assert exchange.reservation is not None
        stream.events.cut_short(errors.quota_ended(exchange.reservation.reserved.funds))

    def _learn(self, stream: _Stream) -> None:
        bound = stream.quote.bound
        if not bound.indivisible:
            self._forecast.add(stream.quote.model.name, -(-stream.events.counted // bound.answers))

    async def _flow(self, stream: _Stream, hold: StreamHold) -> None:
        """Hand the client what comes, as far as it is held for. Raises what ends a stream before its end."""
        events, at_once = stream.events, None
        # The upstream's own limit does not run while the client is slow to read; this one does.
        async with asyncio.timeout(_total_s(stream)):
            while chunk := await stream.answer.read(at_once):
                if block := events.feed(chunk, hold.covered):
                    await self._hand_out(stream, block)
                if events.counted > hold.enough_until or events.waiting:
                    hold.follow()
                if events.waiting:
                    await self._await_cover(stream, hold)
                if events.done:
                    return
                at_once = at_once or _at_once(stream, hold)
            if block := events.end(hold.covered):
                await self._hand_out(stream, block)
            await self._await_cover(stream, hold)

    async def _await_cover(self, stream: _Stream, hold: StreamHold) -> None:
        while stream.events.waiting:
            await hold.more()
            if block := stream.events.release(hold.covered):
                await self._hand_out(stream, block)

    async def _hand_out(self, stream: _Stream, block: bytes) -> None:
        if not stream.response.prepared:
            stream.exchange.first_byte = time.perf_counter()
            await stream.response.prepare(stream.request)
        await write(stream.request, stream.response, block)

    async def _stop(self, stream: _Stream) -> None:
        """Stop the upstream, and charge what the client was handed."""
        stream.answer.abandon()
        await self._charge_as_seen(stream)

    async def _charge_as_seen(self, stream: _Stream) -> None:
        quote, events = stream.quote, stream.events
        await self._settling.charge(stream.exchange, quote.model, quote.most_femto, events.metered(complete=False))

    async def _break_off(self, stream: _Stream, failure: Failure) -> web.StreamResponse:
        exchange = stream.exchange
        if not stream.response.prepared:
            return self._reports.fail(exchange, failure)
        # The SDKs take a clean end for success, whatever was missing: the stream must end in an error that they see.
        exchange.reason = failure.code
        await write_last(stream.response, self._reports.event(exchange, failure))
        return stream.response


def _at_once(stream: _Stream, hold: StreamHold) -> Taker | None:
    """What hands the client events as they arrive, without the relay: those that need only be counted, while enough is
    held and the client keeps up. None where there is no such way."""
    transport = chunked_transport(stream.request, stream.response)
    if transport is None:
        return None
    # Looked up once for all events.
    takes, is_closing, unsent_bytes, write = (
        stream.events.takes, transport.is_closing, transport.get_write_buffer_size, transport.write
    )  # fmt: skip
    until_low = hold.covered - hold.enough_until  # which stays the same

    def take(block: bytes) -> bool:
        if unsent_bytes() + len(block) > KEEPS_UP_BYTES or is_closing():
            return False
        shown = takes(block, hold.covered - until_low)
        if shown:
            write(b"%x\r\n%b\r\n" % (len(shown), shown))
        return bool(shown)

    return take


def _total_s(stream: _Stream) -> float:
    return stream.exchange.config.upstreams[stream.quote.model.upstream].total_timeout_ms / 1000
