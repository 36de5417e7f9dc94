"""The kinds of values that the configuration files hold: how each is written, read, and described in the schema.

Every reader takes the text of a scalar and raises ValueError with the rest of a sentence that begins with the
field's name. A reader that quotes a value quotes it as written in the file, never as the environment filled it in;
URLs and secrets are never quoted.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, PlainValidator, ValidationInfo, WithJsonSchema

from gateway.config.document import Text, quoted
from gateway.config.model import Address, CountOutput, KeyHeader, Secret
from gateway.config.problem import suggestion
from gateway.domain.money import MAX_NANO, AmountError, format_credits, parse_credits
from gateway.domain.plan import DAY_MS, FULL_RATE_PPM, OnLost

PriceUnit = Literal["usd_per_million_tokens", "usd_per_token"]
PRICE_UNITS: tuple[PriceUnit, ...] = ("usd_per_million_tokens", "usd_per_token")

#: With prices.MOST_PRICE this keeps the dearest tokens of a request (input and output, 40,000 credits) far below
#: MAX_NANO.
MOST_TOKENS = 10_000_000
MOST_SIZE_BYTES = 2**30

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: A day: longer audio than any upstream takes.
MOST_AUDIO_SECONDS = 86_400
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")

_DURATION_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_SIZE_BYTES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Context:
    """What readers must know of the rest of the files. None: unknown because of another mistake, so do not check."""

    upstreams: Collection[str] | None
    models: Collection[str] | None
    price_unit: PriceUnit | None


def scalar(value: object) -> Text:
    """The text of a value that must be a single one and not empty."""
    text = possibly_empty(value)
    if not text.text.strip():
        raise ValueError("is empty: write a value or remove the line")
    return text


def possibly_empty(value: object) -> Text:
    """The text of a value that must be a single one."""
    if isinstance(value, str):  # a default of the raw model
        return Text(value, value)
    if not isinstance(value, Text):
        raise ValueError(f"must be a single value, not a {'mapping' if isinstance(value, dict) else 'list'}")
    return value


def boolean(value: object) -> bool:
    """True or False."""
    text = scalar(value)
    if text.text.lower() not in ("true", "false"):
        raise ValueError(f"must be true or false, not {quoted(text.written)}")
    return text.text.lower() == "true"


def integer(value: object, least: int, most: int) -> int:
    """A whole number in a range."""
    text = scalar(value)
    if not re.fullmatch(r"[0-9]{1,12}", text.text) or not least <= int(text.text) <= most:
        raise ValueError(f"must be a whole number from {least} to {most}, not {quoted(text.written)}")
    return int(text.text)


def duration_ms(value: object, least: str, most: str) -> int:
    """Milliseconds of a duration such as ``90s``, from least to most (written likewise)."""
    text = scalar(value)
    milliseconds = _milliseconds(text.text)
    if milliseconds is None:
        raise ValueError(f"must be a duration such as 24h, 30m, 90s or 500ms, not {quoted(text.written)}")
    if not (_milliseconds(least) or 0) <= milliseconds <= (_milliseconds(most) or 0):
        raise ValueError(f"must be from {least} to {most}, not {quoted(text.written)}")
    return milliseconds


def _milliseconds(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9})(ms|s|m|h)", text)
    return int(match[1]) * _DURATION_MS[match[2]] if match else None


def refresh_ms(value: object) -> int:
    """Milliseconds of a refresh cycle; no window may cross midnight UTC."""
    milliseconds = duration_ms(value, "1s", "24h")
    if DAY_MS % milliseconds:
        raise ValueError(
            "must divide 24 hours evenly, so that no window crosses midnight UTC, as 24h, 12h, 8h, 6h and 30m do, "
            f"not {quoted(scalar(value).written)}"
        )
    return milliseconds


def size_bytes(value: object) -> int:
    """Bytes of a size such as ``32MiB`` or a plain number."""
    text = scalar(value)
    match = re.fullmatch(r"([0-9]{1,12}) ?([A-Za-z]*)", text.text)
    if not match or match[2] not in _SIZE_BYTES:
        hint = suggestion(match[2], ("KiB", "MiB", "GiB")) if match else "write KiB, MiB or GiB, or plain bytes"
        raise ValueError(f"must be a size such as 32MiB, not {quoted(text.written)}: {hint}")
    size = int(match[1]) * _SIZE_BYTES[match[2]]
    if not 1 <= size <= MOST_SIZE_BYTES:
        raise ValueError(f"must be from 1 byte to 1GiB, not {quoted(text.written)}")
    return size


def credits_nano(value: object) -> int:
    """Nano-credits of a plain decimal."""
    text = scalar(value)
    try:
        return parse_credits(text.text)
    except AmountError:
        raise ValueError(
            "must be an amount of credits, a plain decimal such as 12.50 with at most 9 decimals and at most "
            f"{format_credits(MAX_NANO)}, not {quoted(text.written)}"
        ) from None


def rate_ppm(value: object) -> int:
    """Parts per million of a rate such as ``0.9``."""
    text = scalar(value)
    if re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", text.text):
        rate = Decimal(text.text)
        if Decimal("0.01") <= rate <= 10:
            return int(rate * FULL_RATE_PPM)
    raise ValueError(
        "must be a plain number from 0.01 to 10 with at most 6 decimals (1 is the list price), "
        f"not {quoted(text.written)}"
    )


def price_unit(value: object) -> PriceUnit:
    """The unit of every price of a file."""
    unit: PriceUnit = _one_of(value, PRICE_UNITS, "unit")
    return unit


def _one_of(value: object, words: Collection[str], kind: str) -> Any:
    """A word that must be one of these; kind: what they are, for the message."""
    text = scalar(value)
    if text.text not in words:
        raise ValueError(f"must be a known {kind}, not {quoted(text.written)}: {suggestion(text.written, words)}")
    return text.text


def tokens_within(value: object, info: ValidationInfo) -> int:
    """The most tokens of an answer: a part of the context window."""
    tokens = integer(value, 1, MOST_TOKENS)
    window = info.data.get("context_window")
    if window is not None and tokens > window:
        raise ValueError(f"must be at most the context_window ({window}), not {tokens}")
    return tokens


def known_upstream(value: object, info: ValidationInfo) -> str:
    """The name of an upstream of the main file."""
    text = scalar(value)
    names = context_of(info).upstreams
    if names is not None and text.text not in names:
        raise ValueError(f"names no upstream, it is {quoted(text.written)}: {suggestion(text.written, names)}")
    return text.text


def known_model(value: object, info: ValidationInfo) -> str:
    """The name of a model of the same file."""
    text = scalar(value)
    names = context_of(info).models
    if names is not None and text.text not in names:
        raise ValueError(f"names no model, it is {quoted(text.written)}: {suggestion(text.written, names)}")
    return text.text


def context_of(info: ValidationInfo) -> Context:
    """What the loader says of the rest of the files."""
    if not isinstance(info.context, Context):
        raise TypeError("a price or a reference is read without its context")
    return info.context


def short_name(key: str) -> str:
    """The name of a plan or an upstream."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", key):
        raise ValueError("is not a name: write 1 to 64 of a-z, 0-9, _ and -, not starting with _ or -")
    return key


def model_name(key: str) -> str:
    """The name of a model, as clients send it."""
    if not 1 <= len(key) <= 200 or not key.isprintable() or " " in key or "|" in key:
        raise ValueError("is not a model name: write 1 to 200 printable characters without spaces and |")
    return key


def path_pattern(key: str) -> str:
    """A path below ``/v1``, or all paths below one."""
    plain = key.removesuffix("/*")
    segments = plain.split("/")[1:]
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]{1,64}){1,8}", plain) or {".", ".."} & set(segments):
        raise ValueError("is not a path: write one below /v1 such as /files, or /files/* for all paths below it")
    return key


def methods(value: object) -> frozenset[str]:
    """HTTP methods, from a list."""
    if isinstance(value, frozenset):  # the default of the raw model
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of methods, such as [GET, POST]")
    names = [scalar(item).text for item in value]
    if wrong := next((name for name in names if name not in METHODS), None):
        raise ValueError(f"has {wrong[:64]!r}: {suggestion(wrong, METHODS)}")
    return frozenset(names)


def other_model(value: object) -> str:
    """The name of a model at its upstream."""
    text = scalar(value)
    try:
        return model_name(text.text)
    except ValueError as error:
        raise ValueError(f"{error}, not {quoted(text.written)}") from error


def secret(value: object) -> Secret:
    """A key or token, possibly empty; white space around it is dropped, as files and variables often end in some."""
    text = possibly_empty(value).text.strip()
    if not re.fullmatch(r"[!-~]*", text):
        raise ValueError("holds spaces or characters that no HTTP header can carry: check the value (it is not shown)")
    return Secret(text)


def directory(value: object) -> Path:
    """A path."""
    return Path(scalar(value).text)


def address(value: object) -> Address:
    """``host:port``; an IPv6 host is in brackets."""
    text = scalar(value)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text.text)
    if not match or int(match[3]) > 65535 or (match[1] and not _is_ipv6(match[1])):
        raise ValueError(
            "must be host:port such as 127.0.0.1:8080, 0.0.0.0:8080 or [::1]:8080 with a port from 0 to 65535, "
            f"not {quoted(text.written)}"
        )
    return Address(match[1] or match[2], int(match[3]))


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def base_url(value: object) -> str:
    """An http or https URL without trailing slash."""
    text = scalar(value).text
    parts = _split_url(text)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL such as https://api.example.com/v1")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user or password: use api_key")
    if "?" in text or "#" in text:
        raise ValueError("must not hold a ? or #: the gateway appends paths such as /chat/completions to it")
    return text.rstrip("/")


def store_url(value: object) -> str:
    """``embedded`` or a URL of a supported scheme."""
    text = scalar(value).text
    if text == "embedded":
        return text
    if re.match(r"rediss?\+(cluster|sentinel)://", text):
        return _distributed_store_url(text)
    parts = _split_url(text)
    scheme = parts.scheme if parts else ""
    has_target = parts and (parts.path if scheme == "unix" else parts.hostname)
    if scheme not in ("redis", "rediss", "unix") or not has_target:
        raise ValueError(
            "must be embedded, or a URL such as redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket "
            "(the value is not shown: it may hold a password)"
        )
    return text


def _distributed_store_url(text: str) -> str:
    """A store URL that lists several hosts, which ``urlsplit`` knows nothing of."""
    scheme, _, rest = text.partition("://")
    hosts, _, path = rest.partition("?")[0].rpartition("@")[2].partition("/")
    known = [_split_url(f"redis://{host}") for host in hosts.split(",")]
    if re.search(r"[\s\x00-\x1f\x7f]", text) or not all(parts and parts.hostname for parts in known):
        raise ValueError(
            f"must list its servers as {scheme}://host:port,host:port (the value is not shown: it may hold a password)"
        )
    if scheme.endswith("cluster") and path not in ("", "0"):
        raise ValueError("must not name a database: a cluster has only database 0")
    if scheme.endswith("sentinel") and not re.fullmatch(r"[^/]+(/[0-9]*)?", path):
        raise ValueError(f"must name the primary that the sentinels watch: {scheme}://host:port,host:port/name")
    return text


def archive_url(value: object) -> str:
    """``sqlite`` or a URL of a supported scheme."""
    text = scalar(value).text
    if text == "sqlite":
        return text
    parts = _split_url(text)
    scheme = parts.scheme if parts else ""
    if scheme == "postgres":
        raise ValueError("is a postgres:// URL: did you mean postgresql://?")
    # Without a host the query may name one, a directory of sockets for example.
    has_target = parts and (_is_file_url(parts) if scheme == "sqlite" else parts.hostname or "host=" in parts.query)
    if scheme not in ("sqlite", "postgresql") or not has_target:
        raise ValueError(
            "must be sqlite, or a URL such as sqlite:///path/to/ledger.sqlite3 or postgresql://user@host:5432/database "
            "(the value is not shown: it may hold a password)"
        )
    return text


def _is_file_url(parts: Any) -> bool:
    return not parts.netloc and not parts.query and not parts.fragment and len(parts.path) > 1


def _split_url(text: str) -> Any:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises for a port that is no number
    except ValueError:
        return None
    return None if re.search(r"[\s\x00-\x1f\x7f]", text) else parts


def _text_schema(pattern: str) -> dict[str, Any]:
    # A value may always come from the environment, which only the loader can check.
    return {"type": "string", "pattern": rf"{pattern}|\$\{{"}


def number_schema(pattern: str, kind: str, **bounds: float) -> WithJsonSchema:
    """A number, or a text of the pattern, or one with a variable."""
    return WithJsonSchema({"anyOf": [{"type": kind, **bounds}, _text_schema(pattern)]})


_DURATION_SCHEMA = WithJsonSchema(_text_schema(r"^[0-9]{1,9}(ms|s|m|h)$"))
_TOKENS_SCHEMA = number_schema("^[0-9]{1,8}$", "integer", minimum=1, maximum=MOST_TOKENS)


def limit_field(value: object) -> str:
    """The name of the request field that limits an answer."""
    text = scalar(value)
    if text.text not in LIMIT_FIELDS:
        raise ValueError(f"is {quoted(text.written)}, not {' or '.join(LIMIT_FIELDS)}")
    return text.text


_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def field_names(value: object) -> frozenset[str]:
    """Names of request fields, from a list."""
    if isinstance(value, frozenset):  # the default of the raw model
        return value
    if not isinstance(value, list):
        raise ValueError("must be a list of request fields, such as [n_probs, id_slot]")
    names = [scalar(item).text for item in value]
    if wrong := next((name for name in names if not _FIELD_NAME.fullmatch(name)), None):
        raise ValueError(f"has {wrong[:64]!r}, which is not the name of a request field")
    return frozenset(names)


_SECRET_SCHEMA = WithJsonSchema({"type": ["string", "number", "null"]})

Boolean = Annotated[
    bool, PlainValidator(boolean), WithJsonSchema({"anyOf": [{"type": "boolean"}, _text_schema("^(true|false)$")]})
]
LimitField = Annotated[
    Literal["max_tokens", "max_completion_tokens"],
    PlainValidator(limit_field),
    WithJsonSchema({"enum": list(LIMIT_FIELDS)}),
]
FieldNames = Annotated[
    frozenset[str],
    PlainValidator(field_names),
    WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": f"^{_FIELD_NAME.pattern}$"}}),
]
TimeoutMs = Annotated[int, PlainValidator(lambda value: duration_ms(value, "1ms", "24h")), _DURATION_SCHEMA]
StoreTimeoutMs = Annotated[int, PlainValidator(lambda value: duration_ms(value, "1ms", "60s")), _DURATION_SCHEMA]
RefreshMs = Annotated[int, PlainValidator(refresh_ms), _DURATION_SCHEMA]
SizeBytes = Annotated[
    int,
    PlainValidator(size_bytes),
    number_schema("^[0-9]{1,12} ?(B|KiB|MiB|GiB)?$", "integer", minimum=1, maximum=MOST_SIZE_BYTES),
]
CreditsNano = Annotated[
    int,
    PlainValidator(credits_nano),
    number_schema(r"^[0-9]{1,7}(\.[0-9]{1,9})?$", "number", minimum=0, maximum=MAX_NANO / 10**9),
]
RatePpm = Annotated[
    int, PlainValidator(rate_ppm), number_schema(r"^[0-9]{1,2}(\.[0-9]{1,6})?$", "number", minimum=0.01, maximum=10)
]
Unit = Annotated[PriceUnit, PlainValidator(price_unit), WithJsonSchema({"enum": list(PRICE_UNITS)})]
CountWay = Annotated[
    CountOutput,
    PlainValidator(lambda value: _one_of(value, get_args(CountOutput), "way to count")),
    WithJsonSchema({"enum": list(get_args(CountOutput))}),
]
KeyPlace = Annotated[
    KeyHeader,
    PlainValidator(lambda value: _one_of(value, get_args(KeyHeader), "header for keys")),
    WithJsonSchema({"enum": list(get_args(KeyHeader))}),
]
OnLostWay = Annotated[
    OnLost,
    PlainValidator(lambda value: _one_of(value, get_args(OnLost), "way to charge")),
    WithJsonSchema({"enum": list(get_args(OnLost))}),
]
Tokens = Annotated[int, PlainValidator(lambda value: integer(value, 1, MOST_TOKENS)), _TOKENS_SCHEMA]
TokensWithin = Annotated[int, PlainValidator(tokens_within), _TOKENS_SCHEMA]
TemplateTokens = Annotated[
    int,
    PlainValidator(lambda value: integer(value, 0, 100_000)),
    number_schema("^[0-9]{1,6}$", "integer", minimum=0, maximum=100_000),
]
AudioSeconds = Annotated[
    int,
    PlainValidator(lambda value: integer(value, 1, MOST_AUDIO_SECONDS)),
    number_schema("^[0-9]{1,5}$", "integer", minimum=1, maximum=MOST_AUDIO_SECONDS),
]
Methods = Annotated[
    frozenset[str],
    PlainValidator(methods),
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"enum": list(METHODS)}}),
]
PathPattern = Annotated[str, AfterValidator(path_pattern), WithJsonSchema({"type": "string"})]
FallbackReference = Annotated[str, PlainValidator(known_model), WithJsonSchema({"type": "string", "minLength": 1})]
UpstreamReference = Annotated[str, PlainValidator(known_upstream), WithJsonSchema({"type": "string", "minLength": 1})]
ShortName = Annotated[str, AfterValidator(short_name), WithJsonSchema({"type": "string"})]
OtherModel = Annotated[str, PlainValidator(other_model), WithJsonSchema({"type": "string", "minLength": 1})]
ModelName = Annotated[str, AfterValidator(model_name), WithJsonSchema({"type": "string"})]
SecretText = Annotated[Secret, PlainValidator(secret), _SECRET_SCHEMA]
Directory = Annotated[Path, PlainValidator(directory), WithJsonSchema({"type": "string", "minLength": 1})]
Listen = Annotated[
    Address, PlainValidator(address), WithJsonSchema(_text_schema(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"))
]
BaseUrl = Annotated[str, PlainValidator(base_url), WithJsonSchema(_text_schema("^https?://[^?#@]+$"))]
StoreUrl = Annotated[
    str,
    PlainValidator(store_url),
    WithJsonSchema(
        _text_schema(
            r"^embedded$|^(rediss?|unix)://|^rediss?\+cluster://[^/?]+(/0?)?(\?|$)|^rediss?\+sentinel://[^/?]+/[^/?]+"
        )
    ),
]
ArchiveUrl = Annotated[
    str, PlainValidator(archive_url), WithJsonSchema(_text_schema("^sqlite$|^sqlite:///.|^postgresql://"))
]
