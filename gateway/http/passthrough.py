"""Paths that the configuration prices by the request: found, and made ready to be forwarded unread."""

import re
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.apis.unread import Unread
from gateway.config.model import GatewayConfig, Passthrough
from gateway.domain.request import bound_of
from gateway.http.quote import Quote
from gateway.upstream.client import Upload

_UNREAD = Unread()
# What some servers take for another path than it seems: dots, empty segments, and signs that are hidden.
_ODD = re.compile(r"(?:^|/)\.{1,2}(?:/|$)|//|\\|%(?:2e|2f|5c|00)", re.IGNORECASE)


def priced_path(config: GatewayConfig, path: str, raw_path: str) -> Passthrough | None:
    """The configuration's entry for a path below ``/v1``; None where there is none. raw_path: as it was sent."""
    if _ODD.search(raw_path):
        return None
    exact = config.passthrough.get(path)
    if exact is not None:
        return exact
    patterns = [rule for rule in config.passthrough.values() if rule.matches(path)]
    return max(patterns, key=lambda rule: len(rule.pattern), default=None)


def unread_quote(rule: Passthrough) -> Quote:
    """The price of a request, whatever is in it."""
    ask = _UNREAD.ask(rule.pattern)
    return Quote(_UNREAD, ask, rule.price, bound_of(ask, rule.price), {}, b"")


class UnreadBody:
    """A request's body on its way through. too_large: whether it was cut for that."""

    def __init__(self, request: web.BaseRequest, most_bytes: int) -> None:
        self._request = request
        self._most_bytes = most_bytes
        self.too_large = False

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
        async for chunk in self._request.content.iter_any():
            left -= len(chunk)
            if left < 0:
                self.too_large = True
                raise ValueError("the body is too large")
            yield chunk
