"""Where the store's nodes are and how to log in to them: what a store URL says."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from gateway.credits.errors import StoreUnsuitable

_OPTIONS = {"host", "port", "path", "username", "password", "db", "ssl_ca_certs", "connection_class"}
_CLUSTER_PORT, _SENTINEL_PORT = 6379, 26379


class Address(NamedTuple):
    """A node's host, IPv6 without brackets, and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server and how to log in to it. path: of a unix socket, which then counts instead of host and port.
    ca_file: the authority of its certificate, where the system does not know it."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: bool = False
    ca_file: str | None = None

    def at(self, address: Address) -> "Endpoint":
        """Another node with the same login."""
        return replace(self, host=address.host, port=address.port)

    def without_login(self) -> "Endpoint":
        """The same server, nobody logged in and no database chosen."""
        return replace(self, username="", password="", database=0)

    def __str__(self) -> str:
        return self.path or str(Address(self.host, self.port))


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store URL, read. addresses: some nodes of a cluster, or the sentinels; none for a single server.
    primary_name: what the sentinels call the primary."""

    kind: Literal["single", "cluster", "sentinel"]
    endpoint: Endpoint
    addresses: tuple[Address, ...] = ()
    primary_name: str = ""


def read_url(url: str) -> StoreUrl:
    """Read a store URL. Raises StoreUnsuitable for one that makes no sense, or has an option without effect here.

    redis://, rediss:// and unix:// name one server; ``redis+cluster://HOST:PORT,…`` some nodes of a cluster;
    ``redis+sentinel://HOST:PORT,…/PRIMARY[/DATABASE]`` sentinels. An s (rediss+cluster) means TLS to every node.
    """
    scheme, plus, kind = url.partition("://")[0].partition("+")
    if not plus:
        return StoreUrl("single", _endpoint(url))
    if scheme not in ("redis", "rediss") or kind not in ("cluster", "sentinel"):
        raise StoreUnsuitable("store.url has a scheme that is not known")
    parts = urlsplit(url)
    login, at, nodes = parts.netloc.rpartition("@")
    addresses = tuple(
        _address(node, _CLUSTER_PORT if kind == "cluster" else _SENTINEL_PORT) for node in nodes.split(",")
    )
    primary_name, _, database = (
        parts.path.removeprefix("/").partition("/") if kind == "sentinel" else ("", "", parts.path)
    )
    endpoint = _endpoint(f"{scheme}://{login}{at}localhost/{database.strip('/')}?{parts.query}")
    if kind == "cluster":
        if endpoint.database:
            raise StoreUnsuitable("store.url names a database, but a cluster has only database 0")
        return StoreUrl("cluster", endpoint, addresses)
    if not primary_name:
        raise StoreUnsuitable("store.url must name the primary that the sentinels watch: …@HOST:PORT/NAME")
    return StoreUrl("sentinel", endpoint, addresses, unquote(primary_name))


def _endpoint(url: str) -> Endpoint:
    if url.startswith("unix://") and not set("@?") & set(url):
        # Such as the embedded store's, which shall not wait a tenth of a second for the import below.
        return Endpoint(path=unquote(url.removeprefix("unix://")))
    from redis.asyncio.connection import parse_url  # noqa: PLC0415

    try:
        options: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:  # its text may hold the password
        raise StoreUnsuitable("store.url is not a URL of a store") from error
    if unknown := options.keys() - _OPTIONS:
        raise StoreUnsuitable(f"store.url has options that are not supported: {', '.join(sorted(unknown))}")
    return Endpoint(
        host=options.get("host") or "localhost",
        port=options.get("port") or 6379,
        path=options.get("path") or "",
        username=options.get("username") or "",
        password=options.get("password") or "",
        database=int(options.get("db") or 0),
        tls=url.startswith("rediss://"),
        ca_file=options.get("ssl_ca_certs"),
    )


def _address(text: str, default_port: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or "@" in text:
        raise StoreUnsuitable("store.url must list its nodes as HOST:PORT,HOST:PORT,…")
    return Address(host, port or default_port)
