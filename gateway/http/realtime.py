"""GET /v1/realtime: a websocket whose responses are reserved, held for and charged one by one.

The first response is reserved before the upstream is connected, and the upstream is connected before the client's
handshake is completed: whatever stands against a session is an ordinary HTTP answer.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlencode

from aiohttp import web

from gateway.apis.realtime_conversation import Conversation
from gateway.credits.service import CreditEngine, Identity
from gateway.domain.forecast import OutputForecast
from gateway.domain.model import Model
from gateway.domain.request import Ask, InvalidRequest
from gateway.http import errors
from gateway.http.errors import Failure, funds_headers
from gateway.http.exchange import Exchange, credit_headers
from gateway.http.realtime_over import SessionOver, end_turns, over_of
from gateway.http.realtime_session import Session
from gateway.http.realtime_turn import Counter, NoTurn, Turn, reserve_turn, use_of
from gateway.http.realtime_turns import Turns
from gateway.http.reports import Reports
from gateway.http.settling import Settling
from gateway.telemetry.metrics import Metrics
from gateway.upstream.websocket import HEARTBEAT_S, MOST_MESSAGE_BYTES, UpstreamRefused, connect

log = logging.getLogger(__name__)

_KEY_PROTOCOL = "openai-insecure-api-key."
_PROTOCOL = "realtime"
#: Of what a client offers, this and what begins so is for the upstream; the rest names keys and owners of keys.
_BETA_PROTOCOL = "openai-beta."
#: Queries that make something else of the session, at another price.
_REFUSED_PARAMETERS = ("call_id", "intent")
#: The longest session.
SESSION_S = 3600.0
# How long a client may take to answer that its session is over. Where the gateway stops, it is not heard any more.
_CLOSE_S = 0.5


class Realtime:
    """Serves sessions, and ends them when the gateway does."""

    def __init__(self, engine: CreditEngine, metrics: Metrics, reports: Reports, settling: Settling) -> None:
        self._engine = engine
        self._metrics = metrics
        self._reports = reports
        self._counter = Counter(engine, settling, reports, metrics, OutputForecast())
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Let every session end as soon as none of its responses is under way."""
        self._closing.set()

    async def serve(self, exchange: Exchange, request: web.BaseRequest, secret: str | None) -> web.StreamResponse:
        """Answer the handshake, and all that follows it. secret: the customer's, where a header has it.

        Before the handshake is answered, raises what any request raises.
        """
        if not _new_socket().can_prepare(_without_keys(request)):
            return self._reports.fail(exchange, errors.upgrade_required())
        offered = _offered(request.headers.getall("Sec-WebSocket-Protocol", []))
        exchange.identity = await self._authenticate(secret, offered)
        if exchange.identity is None:
            return self._reports.fail(exchange, errors.bad_key())
        try:
            model = _model_of(exchange, request)
        except InvalidRequest as error:
            return self._reports.fail(exchange, errors.invalid_upgrade(error))
        if isinstance(model, Failure):
            return self._reports.fail(exchange, model)
        exchange.ask = Ask("realtime", model.name, None)
        conversation = Conversation(model.context_window, model.template_tokens)
        use = use_of(model, exchange.config.upstreams[model.upstream], conversation.input_size())
        first = await reserve_turn(self._counter, exchange.config, exchange.identity, model, use)
        if isinstance(first, NoTurn):
            exchange.decision = "denied"
            headers = funds_headers(first.funds) if first.funds else None
            return self._reports.fail(exchange, first.failure, headers)
        exchange.decision, exchange.reservation = "admitted", first.reservation
        return await self._connected(exchange, request, model, conversation, first, offered)

    async def _authenticate(self, secret: str | None, offered: list[str]) -> Identity | None:
        named = [one.removeprefix(_KEY_PROTOCOL) for one in offered if one.startswith(_KEY_PROTOCOL)]
        key = secret or next(iter(named), None)
        return await self._engine.authenticate(key) if key else None

    async def _connected(
        self,
        exchange: Exchange,
        request: web.BaseRequest,
        model: Model,
        conversation: Conversation,
        first: Turn,
        offered: list[str],
    ) -> web.StreamResponse:
        upstream = exchange.config.upstreams[model.upstream]
        path = f"/realtime?{urlencode({'model': model.sent_as or model.name})}"
        protocols = [one for one in offered if one == _PROTOCOL or one.startswith(_BETA_PROTOCOL)]
        session: Session | None = None
        inflight = self._metrics.upstream_inflight(upstream.name)
        inflight.add()
        try:
            async with connect(upstream, path, request.headers, protocols) as socket:
                client = await _accepted(exchange, request)
                turns = Turns(self._counter, exchange, model, conversation)
                turns.spare = first
                session = Session(exchange, model, conversation, turns, client, socket)
                await self._run(session, upstream.idle_timeout_ms / 1000)
                return client
        except UpstreamRefused as error:
            log.warning("%s: %s", exchange.id, error)
            failure = errors.upstream_refused(error.status, error.headers, error.body)
            return self._reports.fail(exchange, failure)
        finally:
            inflight.add(-1)
            if session is None:
                await first.void()

    async def _run(self, session: Session, idle_s: float) -> None:
        """Pass frames either way until the session is over, and end it. Raises only what cancels."""
        watch = self._watch(session, idle_s)
        tasks = [asyncio.ensure_future(work) for work in (session.pass_client(), session.pass_upstream(), watch)]
        why: BaseException | None = None
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            why = next(error for task in tasks if task in done and (error := task.exception()))
        except asyncio.CancelledError as error:  # the client is gone, or the gateway ends
            why = error
            raise
        finally:
            for task in tasks:
                task.cancel()
            assert why is not None
            # A second cancellation must not leave a turn without its end.
            await asyncio.shield(asyncio.ensure_future(self._end(session, tasks, why)))

    async def _end(self, session: Session, tasks: Sequence["asyncio.Future[None]"], why: BaseException) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        over = over_of(why, session)
        exchange = session.exchange
        exchange.status = 101
        exchange.reason = over.failure.code if over.failure else exchange.reason
        await end_turns(session, over)
        if session.client.closed:
            return
        try:
            async with asyncio.timeout(2 * _CLOSE_S):
                if over.failure is not None:
                    await session.tell(over.failure)
                await session.client.close(code=over.code, message=over.reason.encode())
        except Exception as error:
            log.info("%s: the client could not be told how its session ended: %s", exchange.id, error or "no answer")

    async def _watch(self, session: Session, idle_s: float) -> None:
        """End the session when it has lasted long enough, when nothing moves, or when the gateway ends."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SESSION_S
        while not self._closing.is_set():
            until = min(deadline, session.moved + idle_s)
            if until <= loop.time():
                which = "lasted an hour" if until == deadline else "was idle for too long"
                raise SessionOver(1001, errors.session_ended(f"The session {which}."))
            try:
                async with asyncio.timeout_at(until):
                    await self._closing.wait()
            except TimeoutError:
                continue
        async with session.turns.lock:
            await session.turns.lock.wait_for(lambda: not session.turns.busy)
        raise SessionOver(1001, errors.session_ended("The gateway restarts; connect again."))


def _new_socket() -> web.WebSocketResponse:
    return web.WebSocketResponse(
        protocols=(_PROTOCOL,),
        timeout=_CLOSE_S,
        heartbeat=HEARTBEAT_S,
        max_msg_size=MOST_MESSAGE_BYTES,
        compress=False,
    )


def _without_keys(request: web.BaseRequest) -> web.BaseRequest:
    """The handshake, of whose subprotocols only the one is left that the client can get: none of the others, which may
    be a key, is to be seen in a log."""
    headers = request.headers.copy()
    if _PROTOCOL in _offered(headers.popall("Sec-WebSocket-Protocol", [])):
        headers["Sec-WebSocket-Protocol"] = _PROTOCOL
    return request.clone(headers=headers)


def _offered(lines: Iterable[str]) -> list[str]:
    return [one.strip() for line in lines for one in line.split(",") if one.strip()]


async def _accepted(exchange: Exchange, request: web.BaseRequest) -> web.WebSocketResponse:
    """The client's handshake, completed."""
    client = _new_socket()
    client.headers.update(credit_headers(exchange))
    await client.prepare(_without_keys(request))
    return client


def _model_of(exchange: Exchange, request: web.BaseRequest) -> Model | Failure:
    """The model that the query names. Raises InvalidRequest."""
    query: Mapping[str, str] = request.rel_url.query
    for name in _REFUSED_PARAMETERS:
        if name in query:
            raise InvalidRequest(f"{name!r} is not supported here: such sessions have another price", name)
    name = query.get("model", "")
    if not name:
        raise InvalidRequest("the query must name a 'model'", "model")
    model = exchange.config.models.get(name)
    if model is None:
        return errors.unknown_model(name)
    if model.prices.tokens is None or not model.max_output_tokens:
        raise InvalidRequest(f"the model {name!r} has no price for /realtime", "model")
    return model
