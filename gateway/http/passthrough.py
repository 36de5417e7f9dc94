"""Paths that the configuration prices by the request: found, and made ready to be forwarded unread."""

import re
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.apis.free import FREE_APIS
from gateway.apis.registry import APIS
from gateway.apis.unread import Unread
from gateway.config.model import GatewayConfig, Passthrough
from gateway.http.exchange import Exchange
from gateway.http.quote import Quote, quote_of
from gateway.upstream.client import Upload, UpstreamAnswer

_UNREAD = Unread()
_PREFIX = re.compile(r"(?:/api)?/v1(?=/)")
# What some servers take for another path than it seems: dots, empty segments, parameters, and signs that are hidden.
_ODD = re.compile(r"(?:^|/)\.{1,2}(?:/|$)|//|\\|;|%(?:[01]|2e|2f|25|3b|5c|7f)|(?:/|%20)$", re.IGNORECASE)
_TAKEN = frozenset({*APIS, *FREE_APIS, "/models", "/realtime"})


def target_of(request: web.BaseRequest) -> str:
    """The path below ``/v1`` with its query, as it was sent."""
    return _PREFIX.sub("", request.rel_url.raw_path_qs, count=1)


def priced_path(config: GatewayConfig, path: str, raw_path: str) -> Passthrough | None:
    """The configuration's entry for a path below ``/v1``; None where there is none. raw_path: as it was sent."""
    if not _PREFIX.match(raw_path) or _ODD.search(raw_path):
        return None
    if path.lower() in _TAKEN:  # some servers serve it all the same, but here it is metered
        return None
    rules = [rule for rule in config.passthrough.values() if rule.matches(path)]
    return max(rules, key=lambda rule: (not rule.pattern.endswith("/*"), len(rule.pattern)), default=None)


def unread_quote(rule: Passthrough) -> Quote:
    """The price of a request, whatever is in it."""
    ask = _UNREAD.ask(rule.pattern)
    return quote_of(_UNREAD, ask, rule.price, {}, b"")


class UnreadBody:
    """A request's body on its way through. too_large: whether it was cut for that; sent: whether all of it was passed
    on. answer: given up if the body breaks; the upstream would wait for the rest of the body for a long time."""

    def __init__(self, exchange: Exchange, request: web.BaseRequest, most_bytes: int) -> None:
        self._exchange = exchange
        self._request = request
        self._most_bytes = most_bytes
        self.too_large = False
        self.sent = False
        self.answer: UpstreamAnswer | None = None

    def upload(self) -> Upload | None:
        """The body for the upstream; None where there is none."""
        request = self._request
        if not request.body_exists:
            return None
        unpacked = "Content-Encoding" in request.headers  # it is forwarded as it was before
        size = None if unpacked else request.content_length
        return Upload(request.headers.get("Content-Type", "application/octet-stream"), size, self._chunks)

    async def _chunks(self) -> AsyncIterator[bytes]:
        left = self._most_bytes
        try:
            async for chunk in self._request.content.iter_any():
                left -= len(chunk)
                if left < 0:
                    self.too_large = True
                    raise ValueError("the body is too large")
                yield chunk
            self.sent = True
        except Exception:
            self._exchange.body_broke = True
            if self.answer is not None:
                self.answer.abandon()
            raise
