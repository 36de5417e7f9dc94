"""What an upstream is told: of the customer's headers those that may pass, and the gateway's own key."""

from collections.abc import Mapping
from functools import lru_cache

from multidict import CIMultiDict
from yarl import URL

from gateway import __version__
from gateway.config.model import Upstream
from gateway.upstream.connection import Pieces
from gateway.upstream.pool import Origin
from gateway.upstream.upload import Upload

#: What a customer's client may say to an upstream. Everything else stays here, above all every form of a key.
_FORWARDED = frozenset({"accept", "user-agent", "openai-beta", "traceparent", "tracestate"})
_FORWARDED_PREFIX = "anthropic-"
_AGENT = f"quota-gateway/{__version__}"
_AGENT_LINE = f"User-Agent: {_AGENT}"
# Requests that have no body need not say so.
_MOST_NAMES = 1000
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


class Head:
    """The heads of requests to one upstream; what they have in common is made once."""

    __slots__ = ("_base_url", "_own", "origin", "upstream")

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        url = URL(upstream.base_url)
        self.origin = Origin(url.scheme == "https", url.raw_host or "", url.port or 0)
        self._base_url = upstream.base_url
        said = {"Host": url.host_port_subcomponent or "", "Accept-Encoding": "identity", **_key_of(upstream)}
        self._own = _lines([f"{name}: {value}" for name, value in said.items()])

    def written(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Pieces | Upload | None
    ) -> bytes:
        """The head of a request. path: below the base URL.

        Raises ValueError for a header that would not stay one, or a path that is none.
        """
        said = [f"{method} {_target(self._base_url, path)} HTTP/1.1"]
        said += [f"{name}: {value}" for name, value in headers.items() if _passing[name]]
        if "user-agent" not in headers:
            said.append(_AGENT_LINE)
        if "accept" not in headers:
            said.append("Accept: */*")
        return f"{_lines(said)}{self._own}{_of_body(method, body)}\r\n".encode("utf-8", "surrogateescape")


def headers_for(upstream: Upstream, headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The same for a client that writes them itself."""
    chosen = CIMultiDict((name, value) for name, value in headers.items() if _passing[name])
    chosen.setdefault("User-Agent", _AGENT)
    chosen["Accept-Encoding"] = "identity"  # the usage is read from the bytes as they come
    chosen.update(_key_of(upstream))
    return chosen


class _Passing(dict[str, bool]):
    """Whether a header may pass, by its name. Clients spell their headers in few ways, so nearly every answer is
    remembered: 0.03 µs instead of 0.2 µs."""

    def __missing__(self, name: str) -> bool:
        lower = name.lower()
        passes = lower in _FORWARDED or lower.startswith(_FORWARDED_PREFIX)
        if len(self) < _MOST_NAMES:
            self[name] = passes
        return passes


_passing = _Passing()


# Most requests go to few paths; taking a URL apart costs 10 µs.
@lru_cache(maxsize=256)
def _target(base_url: str, path: str) -> str:
    """The path and query as they are sent, whatever is odd in them quoted."""
    return URL(base_url + path).raw_path_qs


def _of_body(method: str, body: bytes | Pieces | Upload | None) -> str:
    if body is None:
        return "" if method in _BODILESS else "Content-Length: 0\r\n"
    if not isinstance(body, Upload):
        size_bytes = body.size_bytes if isinstance(body, Pieces) else len(body)
        return f"Content-Type: application/json\r\nContent-Length: {size_bytes}\r\n"
    length = "Transfer-Encoding: chunked" if body.size_bytes is None else f"Content-Length: {body.size_bytes}"
    return _lines([f"Content-Type: {body.content_type}", length])


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
