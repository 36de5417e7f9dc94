"""The configuration as the rest of the program sees it: checked, frozen, with units in the names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from gateway.domain.model import Model
from gateway.domain.plan import Plan

MIB = 2**20

#: How a stream's output is counted while it runs; RawUpstream describes each.
CountOutput = Literal["chunks", "bytes", "usage", "maximum"]

#: The header in which an upstream expects its key: as a bearer token, or by itself.
KeyHeader = Literal["authorization", "x-api-key"]


class Secret:
    """A text that must not be shown: str, repr and format give ``***``. Falsy when empty."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself; only for the moment when it is sent or compared."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "***"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. host: a name or an IP address, IPv6 without brackets. port: 0…65535, 0 means any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _without_secrets(url: str) -> str:
    """The URL without user, password, query and fragment; a word that is none, such as embedded, as it is."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """The admin listener. token: None when none is set, never an empty Secret."""

    listen: Address
    token: Secret | None


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where the credits live.

    url: ``embedded``, or a redis://, rediss://, unix://, redis+cluster:// or redis+sentinel:// URL, which may hold a
        password: show shown_url instead.
    data_dir: the embedded store's directory, relative to the working directory. timeout_ms: 1…60_000.
    allow_unsafe: start even on a store whose settings may lose or evict credits.
    """

    url: str = field(repr=False)
    data_dir: Path
    timeout_ms: int = 2000
    allow_unsafe: bool = False

    @property
    def embedded(self) -> bool:
        """Whether the gateway runs the store itself."""
        return self.url == "embedded"

    @property
    def shown_url(self) -> str:
        """The URL without user, password and query, fit for logs."""
        return _without_secrets(self.url)


@dataclass(frozen=True, slots=True)
class ArchiveConfig:
    """Where the ledger is kept for good.

    url: ``sqlite`` (ledger.sqlite3 in the store's data_dir), sqlite:///absolute/path, or a postgresql:// URL, which may
    hold a password: show shown_url instead.
    """

    url: str = field(default="sqlite", repr=False)

    @property
    def shown_url(self) -> str:
        """The URL without user, password and query, fit for logs."""
        return _without_secrets(self.url)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A server that runs models, spoken to in OpenAI's protocol.

    base_url: http or https, without a trailing slash. api_key: None for a server that needs none; an empty Secret
    only in demo mode. stream_usage: whether ``stream_options.include_usage`` may be added to a streamed request.
    limit_field: the request field that limits an answer's output, which older servers know only by its first name.
    allow_fields: request fields to let through that the gateway does not know to cost nothing.
    count_output: how a stream's output is counted while it runs. key_header: where it looks for its key.
    idle_timeout_ms: the longest silence; total_timeout_ms: the longest answer.
    """

    name: str
    base_url: str
    api_key: Secret | None
    connect_timeout_ms: int = 10_000
    idle_timeout_ms: int = 300_000
    total_timeout_ms: int = 900_000
    stream_usage: bool = True
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    allow_fields: frozenset[str] = frozenset()
    count_output: CountOutput = "chunks"
    key_header: KeyHeader = "authorization"


@dataclass(frozen=True, slots=True)
class Passthrough:
    """A path that is forwarded unread, for a price per request.

    pattern: below ``/v1``; one that ends in ``/*`` stands for all paths below it. price: a model without tokens, which
    names the upstream and the price. methods: those that are forwarded.
    """

    pattern: str
    price: Model
    methods: frozenset[str]

    def matches(self, path: str) -> bool:
        """Whether a path below ``/v1`` is meant. Upper case or lower makes no difference: to some servers it does not,
        and none of them shall be another price's path."""
        pattern, path = self.pattern.lower(), path.lower()
        if pattern.endswith("/*"):
            return path.startswith(pattern[:-1]) and len(path) >= len(pattern)
        return path == pattern


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest request body and the largest answer held in memory, and the largest upload, which is kept on disk, in
    bytes."""

    body_bytes: int = 32 * MIB
    response_bytes: int = 64 * MIB
    upload_bytes: int = 256 * MIB


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything that the configuration files say. Mappings are by name and have at least one entry each, but for
    passthrough, which is by pattern.

    files: the files that were read, the main one first, each with the SHA-256 of its content.
    """

    listen: Address
    admin: AdminConfig
    store: StoreConfig
    upstreams: Mapping[str, Upstream]
    plans: Mapping[str, Plan]
    default_plan: str
    models: Mapping[str, Model]
    limits: Limits
    archive: ArchiveConfig = ArchiveConfig()
    passthrough: Mapping[str, Passthrough] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def demo(self) -> bool:
        """No upstream is set up: each has an api_key line whose value is empty, so the demo model answers."""
        return all(upstream.api_key is not None and not upstream.api_key for upstream in self.upstreams.values())
