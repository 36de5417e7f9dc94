"""One request on its way through the proxy, and what its answer says about credits."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import orjson
from aiohttp import web

from gateway.apis.api import Dialect
from gateway.config.model import GatewayConfig
from gateway.credits.service import Identity, Reservation
from gateway.domain.decision import Settlement, source_of
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.money import format_credits
from gateway.domain.request import Ask
from gateway.http.errors import funds_lines, headers_of, rfc3339
from gateway.upstream.sse import EventStream

_NOTHING = Metered()
_NUMBER_BYTES, _DRAWN_AT_ONCE = 12, 256


def _drawn_numbers() -> Iterator[str]:
    """Requests' own numbers, 24 hex digits that nobody can guess. The kernel's random bytes take 4 µs whether they are
    for one or for many."""
    while True:
        drawn = os.urandom(_NUMBER_BYTES * _DRAWN_AT_ONCE).hex()
        for at in range(0, len(drawn), 2 * _NUMBER_BYTES):
            yield drawn[at : at + 2 * _NUMBER_BYTES]


@dataclass(slots=True)
class Exchange:
    """One request as it goes through, for its answer's headers, its log line and its metrics.

    config: the one that it began with and keeps to its end. slices: as in Holding. from_page: whether a browser asks
    for a page of some origin. dialect: of its errors. events: of the stream that answers it, once that has come.
    answering: the model that answers, once one does. body_broke: the client's body did, while it was passed on.
    """

    config: GatewayConfig
    from_page: bool = False
    dialect: Dialect = "openai"
    number: str = field(default_factory=_drawn_numbers().__next__)
    started: float = field(default_factory=time.perf_counter)
    identity: Identity | None = None
    ask: Ask | None = None
    reservation: Reservation | None = None
    ended: bool = False
    settlement: Settlement | None = None
    metered: Metered = _NOTHING
    slices: Mapping[str, int] = field(default_factory=dict)
    answering: Model | None = None
    body_broke: bool = False
    max_tokens: int | None = None
    decision: str = "none"
    reason: str | None = None
    status: int = 499
    response: web.StreamResponse | None = None
    events: EventStream | None = None
    overhead_s: float = 0.0
    first_byte: float | None = None

    @property
    def id(self) -> str:
        """What x-request-id says."""
        return f"req_{self.number}"

    @property
    def model_name(self) -> str:
        """The model asked for; once a quote was made."""
        assert self.ask is not None
        return self.ask.model


def request_headers(exchange: Exchange) -> dict[str, str]:
    """The request's id, in the header of each SDK."""
    number = exchange.id
    return {"x-request-id": number, "request-id": number}


def credit_headers(exchange: Exchange) -> dict[str, str]:
    """What was held and charged, and what is left."""
    return headers_of(credit_lines(exchange))


def credit_lines(exchange: Exchange) -> str:
    """The same as the lines of a head: written as one text, at a third of what headers one by one take."""
    reservation, settlement, number = exchange.reservation, exchange.settlement, exchange.id
    assert reservation is not None
    reserved, funds = reservation.reserved, None
    from_allowance_nano, from_balance_nano = reserved.from_allowance_nano, reserved.from_balance_nano
    held = format_credits(from_allowance_nano + from_balance_nano)
    cost = model = limit = ""
    if settlement is not None:
        _, _, paid_by_allowance_nano, paid_by_balance_nano, written_off_nano, _, funds = settlement
        cost_nano = paid_by_allowance_nano + paid_by_balance_nano + written_off_nano
        cost = f"x-credits-cost: {format_credits(cost_nano)}\r\n"
        if cost_nano:
            from_allowance_nano, from_balance_nano = paid_by_allowance_nano, paid_by_balance_nano
    if exchange.answering is not None and exchange.answering.name != exchange.model_name:
        model = f"x-credits-model: {exchange.answering.name}\r\n"
    if exchange.max_tokens is not None:
        limit = f"x-credits-max-tokens: {exchange.max_tokens}\r\n"
    source = source_of(from_allowance_nano, from_balance_nano)
    return (
        f"x-request-id: {number}\r\nrequest-id: {number}\r\nx-credits-reserved: {held}\r\n{cost}{model}{limit}"
        f"x-credits-source: {source}\r\n{funds_lines(funds or reserved.funds)}"
    )


def cost_fields(settlement: Settlement | None) -> Mapping[str, object] | None:
    """What the final usage event says of the cost."""
    if settlement is None or settlement.funds is None:
        return None
    funds = settlement.funds
    return {
        "cost": orjson.Fragment(format_credits(settlement.cost_nano)),
        "credits": {
            "cost": format_credits(settlement.cost_nano),
            "source": settlement.source,
            "allowance_remaining": format_credits(funds.allowance_remaining_nano),
            "allowance_resets_at": None if funds.resets_at_ms is None else rfc3339(funds.resets_at_ms),
            "balance": format_credits(funds.balance_nano),
        },
    }
