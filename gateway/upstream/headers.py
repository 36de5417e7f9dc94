"""What an upstream is told: of the customer's headers those that may pass, and the gateway's own key."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import TypeVar

from multidict import CIMultiDict
from yarl import URL

from gateway import __version__
from gateway.config.model import Upstream
from gateway.upstream.connection import Pieces
from gateway.upstream.pool import Origin
from gateway.upstream.upload import Upload

#: What a customer's client may say to an upstream. Everything else stays here, above all every form of a key.
_FORWARDED = frozenset({"accept", "user-agent", "openai-beta", "traceparent", "tracestate"})
_EACH_ITS_OWN = frozenset({"traceparent", "tracestate"})
_FORWARDED_PREFIX = "anthropic-"
_AGENT = f"quota-gateway/{__version__}"
_AGENT_LINE = f"User-Agent: {_AGENT}"
# Requests that have no body need not say so.
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_MOST_CUSTOMS = _MOST_BEGINNINGS = 32
_MOST_KEPT_BYTES = 1024
# A client may send a megabyte of names, each time another.
_MOST_NAME_CHARACTERS = 2048
_JSON_OF = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"

_Key = TypeVar("_Key")
_Known = TypeVar("_Known")


class Head:
    """The heads of requests to one upstream; what they have in common is made once."""

    __slots__ = ("_base_url", "_customs", "_own", "origin", "upstream")

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        url = URL(upstream.base_url)
        self.origin = Origin(url.scheme == "https", url.raw_host or "", url.port or 0)
        self._base_url = upstream.base_url
        said = {"Host": url.host_port_subcomponent or "", "Accept-Encoding": "identity", **_key_of(upstream)}
        self._own = _lines([f"{name}: {value}" for name, value in said.items()])
        self._customs: dict[tuple[str, ...], _Custom] = {}

    def written(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Pieces | Upload | None
    ) -> bytes:
        """The head of a request. path: below the base URL.

        Raises ValueError for a header that would not stay one, or a path that is none.
        """
        names = tuple(headers)
        if len(names) != len(headers):  # one came more than once: by its name only its first value would be found
            return self._beginning(method, path, headers) + _of_body(method, body)
        custom = self._customs.get(names)
        if custom is None:
            custom = _Custom(names)
            if sum(map(len, names)) <= _MOST_NAME_CHARACTERS:
                _remember(self._customs, names, custom, _MOST_CUSTOMS)
        if custom.values_of is None:
            return self._beginning(method, path, headers) + _of_body(method, body)
        said = method, path, custom.values_of(headers)
        beginning = custom.beginnings.get(said)
        if beginning is None:
            beginning = self._beginning(method, path, headers)
            if len(beginning) <= _MOST_KEPT_BYTES:
                _remember(custom.beginnings, said, beginning, _MOST_BEGINNINGS)
        return beginning + _of_body(method, body)

    def _beginning(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """The head up to what it says of the body."""
        said = [f"{method} {_target(self._base_url, path)} HTTP/1.1"]
        said += [f"{name}: {value}" for name, value in headers.items() if _passes(name)]
        if "user-agent" not in headers:
            said.append(_AGENT_LINE)
        if "accept" not in headers:
            said.append("Accept: */*")
        return f"{_lines(said)}{self._own}".encode("utf-8", "surrogateescape")


def headers_for(upstream: Upstream, headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The same for a client that writes them itself."""
    chosen = CIMultiDict((name, value) for name, value in headers.items() if _passes(name))
    chosen.setdefault("User-Agent", _AGENT)
    chosen["Accept-Encoding"] = "identity"  # the usage is read from the bytes as they come
    chosen.update(_key_of(upstream))
    return chosen


def _passes(name: str) -> bool:
    lower = name.lower()
    return lower in _FORWARDED or lower.startswith(_FORWARDED_PREFIX)


class _Custom:
    """How some clients write: the same headers in the same order, and nearly always the same in those that may
    pass. So nearly every head is known but for its length: 8 k instructions instead of 22 k.

    values_of: takes all that may pass out of such headers; None where that would be another for each request, or is
    not found by its name. beginnings: heads up to what they say of the body, by method, path and those values.
    """

    __slots__ = ("beginnings", "values_of")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.beginnings: dict[tuple[str, str, object], bytes] = {}
        passing = [name for name in names if _passes(name)]
        lower = {name.lower() for name in passing}
        self.values_of: Callable[[Mapping[str, str]], object] | None = None
        if len(lower) == len(passing) and lower.isdisjoint(_EACH_ITS_OWN):
            self.values_of = itemgetter(*passing) if passing else _no_values


def _no_values(_: Mapping[str, str]) -> None:
    return None


def _remember(known: dict[_Key, _Known], key: _Key, what: _Known, most: int) -> _Known:
    """What was found out, kept with at most so many others."""
    if len(known) >= most:
        known.clear()
    known[key] = what
    return what


# Most requests go to few paths; taking a URL apart costs 10 µs.
@lru_cache(maxsize=256)
def _target(base_url: str, path: str) -> str:
    """The path and query as they are sent, whatever is odd in them quoted."""
    return URL(base_url + path).raw_path_qs


def _of_body(method: str, body: bytes | Pieces | Upload | None) -> bytes:
    """What a head says of the body, and the head's end."""
    if type(body) is bytes:
        return _JSON_OF % len(body)
    if body is None:
        return b"\r\n" if method in _BODILESS else b"Content-Length: 0\r\n\r\n"
    if not isinstance(body, Upload):
        return _JSON_OF % (body.size_bytes if isinstance(body, Pieces) else len(body))
    length = "Transfer-Encoding: chunked" if body.size_bytes is None else f"Content-Length: {body.size_bytes}"
    return f"{_lines([f'Content-Type: {body.content_type}', length])}\r\n".encode("utf-8", "surrogateescape")


def _key_of(upstream: Upstream) -> dict[str, str]:
    if not upstream.api_key:
        return {}
    key = upstream.api_key.reveal()
    return {"x-api-key": key} if upstream.key_header == "x-api-key" else {"Authorization": f"Bearer {key}"}


def _lines(lines: list[str]) -> str:
    """Lines of a head as they are sent. Raises ValueError for one that would not stay one."""
    # Looking at all of them at once costs a tenth of looking at each.
    said = "".join(lines)
    if "\n" in said or "\r" in said or "\0" in said:
        raise ValueError("a header has a line break in it")
    return "\r\n".join(lines) + "\r\n"
