"""How a realtime session ends: why, with which code, and what becomes of the turns that have not ended."""

import asyncio
import logging
from typing import TYPE_CHECKING

import orjson

from gateway.apis.realtime_answers import RealtimeUsage, TranscriptUsage, part_of, read_server_event, read_usage
from gateway.credits.errors import StoreError, UnknownPlan
from gateway.domain.decision import Funds
from gateway.domain.metered import Metered
from gateway.http import errors
from gateway.http.errors import Failure, rfc3339
from gateway.http.holding import CreditsEnded
from gateway.upstream.websocket import UpstreamClosed

if TYPE_CHECKING:
    from gateway.http.realtime_session import Session
    from gateway.http.realtime_turn import Turn

log = logging.getLogger(__name__)

_MOST_REASON_BYTES = 123
#: How long an upstream may take to say what a response has used that it is told to stop.
_CANCEL_S = 2.0
_INTERNAL_CODE, _AWAY_CODE = 1011, 1001
_BROKEN_CODES = frozenset({1001, 1005, 1006, 1011, 1012, 1013, 1014, 1015})


class ClientLeft(Exception):
    """The client has closed the connection, or does not read any more."""


class SessionOver(Exception):
    """The session is to end. code: of the close frame. charged: whether the client pays for what it was handed of
    responses that are under way: unless it was the upstream that broke."""

    def __init__(self, code: int, failure: Failure | None = None, reason: str = "", *, charged: bool = True) -> None:
        super().__init__(reason or (failure.message if failure else ""))
        self.code = code
        self.failure = failure
        self.reason = _short(reason or (_reason_of(failure) if failure else ""))
        self.charged = charged


def over_of(error: BaseException, session: "Session") -> SessionOver:
    """What an exception means for the session."""
    number = session.exchange.id
    match error:
        case SessionOver():
            return error
        case ClientLeft():
            session.exchange.reason = "client_closed"
            return SessionOver(1000)
        case asyncio.CancelledError():
            return SessionOver(_AWAY_CODE, reason="the gateway ends")
        case UpstreamClosed():
            return _upstream_closed(error, number)
    return _of_credits(error, session)


def _of_credits(error: BaseException, session: "Session") -> SessionOver:
    number = session.exchange.id
    match error:
        case CreditsEnded():
            return SessionOver(1008, errors.credits_ended(_funds(session)))
        case StoreError():
            log.warning("%s: the session was cut: %s", number, error)
            return SessionOver(1013, errors.store_lost(charged=session.turns.busy))
        case UnknownPlan():
            return SessionOver(1013, errors.plan_not_configured(error.plan))
    log.error("%s failed", number, exc_info=error)
    return SessionOver(_INTERNAL_CODE, errors.internal_error())


def _upstream_closed(closed: UpstreamClosed, number: str) -> SessionOver:
    # What a client can bring about does not make its answer free.
    broken = closed.code in _BROKEN_CODES
    if broken:
        log.warning("%s: the upstream's websocket broke: %s", number, closed)
    may_be_sent = closed.code in range(1000, 1015) and closed.code not in (1004, 1005, 1006)
    code = closed.code if may_be_sent or closed.code in range(3000, 5000) else _INTERNAL_CODE
    failure = errors.upstream_unavailable() if broken else None
    return SessionOver(code, failure, closed.reason if not broken else "", charged=not broken)


def _funds(session: "Session") -> Funds:
    """The account's, as a turn knows them: credits that end were held by one."""
    scribe = session.scribe
    return next(turn for turn in (*session.turns.all(), scribe.turn if scribe else None) if turn is not None).funds


async def end_turns(session: "Session", over: SessionOver) -> None:
    """Charge what was handed out, or give back what is held. Each turn ends here exactly once."""
    turns, scribe = session.turns, session.scribe
    usages: dict[str, RealtimeUsage] = {}
    numbers = {number for number, turn in turns.open.items() if turn.handed_out}
    if over.charged and numbers:
        try:
            async with asyncio.timeout(_CANCEL_S):
                await _stop(session, numbers, usages)
        except (UpstreamClosed, TimeoutError) as error:
            log.info("%s: no usage of what was stopped: %s", session.exchange.id, error or "it takes too long")
    while turns.open:
        number, turn = turns.open.popitem()
        billed = turn.handed_out_billed(usages.get(number)) if turn.handed_out else None
        await _end(turn, billed if over.charged else None)
    if scribe is not None and scribe.turn is not None:
        turn, scribe.turn = scribe.turn, None
        billed = scribe.billed(turn, TranscriptUsage()) if turn.handed_out else None
        await _end(turn, billed if over.charged else None)
    while turns.asked:
        await turns.asked.popleft().void()
    if turns.spare is not None:
        spare, turns.spare = turns.spare, None
        await spare.void()


async def _end(turn: "Turn", billed: Metered | None) -> None:
    if billed is None:
        await turn.void()
    else:
        await turn.settle(billed, status=499)


async def _stop(session: "Session", numbers: set[str], usages: dict[str, RealtimeUsage]) -> None:
    """Tell the upstream to stop; what it says of the responses' use goes into usages. Raises UpstreamClosed."""
    for number in numbers:
        await session.upstream.write(orjson.dumps({"type": "response.cancel", "response_id": number}).decode())
    left = set(numbers)
    unread = session.unread
    while left:
        raw, unread = unread if unread is not None else await session.upstream.read(), None
        event = read_server_event(raw)
        if event is not None and event.kind == "response.done" and event.response_id in left:
            left.discard(event.response_id)
            if usage := read_usage(part_of(event.document, "response")):
                usages[event.response_id] = usage


def _reason_of(failure: Failure) -> str:
    if failure.resets_at is not None:
        said = f"credits are spent; the allowance refreshes at {rfc3339(failure.resets_at * 1000)}"
    else:
        said = failure.message
    return f"{failure.code}: {said}"


def _short(reason: str) -> str:
    return reason.encode()[:_MOST_REASON_BYTES].decode(errors="ignore")
