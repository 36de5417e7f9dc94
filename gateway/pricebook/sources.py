"""Where prices come from: an upstream's ``GET /models``, or a file. What each says is read elsewhere."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from gateway.config.model import Upstream
from gateway.pricebook.offer import Offer, Refused, number
from gateway.pricebook.price_file import read_price_file
from gateway.pricebook.upstream_list import UnknownShape, read_list
from gateway.upstream.client import UpstreamClient, UpstreamError

MOST_LIST_BYTES = 8 * 2**20
MOST_FILE_BYTES = 64 * 2**20
MOST_MODELS = 50_000
#: How long an upstream may take to send its list.
ASK_S = 30.0


class SourceError(Exception):
    """The source cannot be read, or has no prices."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a source says of each of its models. name: what people call it. upstream: whose models these are; None for
    a file that was not said to be one's."""

    name: str
    upstream: str | None
    offers: Mapping[str, Offer | Refused]


async def from_upstream(upstream: Upstream) -> Source:
    """Ask the upstream, with its configured key. Raises SourceError."""
    name = f"upstream {upstream.name}, GET {upstream.base_url}/models"
    client = UpstreamClient()
    try:
        async with asyncio.timeout(ASK_S), client.send(upstream, "GET", "/models", {}) as answer:
            if answer.status != 200:
                hint = ": check its api_key" if answer.status in (401, 403) else ""
                raise SourceError(f"{name}: answers {answer.status}{hint}")
            content = await answer.body(MOST_LIST_BYTES)
    except TimeoutError:
        raise SourceError(f"{name}: no answer within {ASK_S:.0f} s") from None
    except UpstreamError as error:
        raise SourceError(f"{name}: {error}") from error
    finally:
        await client.close()
    return _source(name, upstream.name, content, read_list)


def from_file(path: Path, upstream: str | None) -> Source:
    """Read a price file. Raises SourceError."""
    name = f"price file {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_FILE_BYTES:
        raise SourceError(f"{name}: is larger than {MOST_FILE_BYTES // 2**20} MiB")
    return _source(name, upstream, content, read_price_file)


def _source(
    name: str, upstream: str | None, content: bytes, read: Callable[[object], dict[str, Offer | Refused]]
) -> Source:
    try:
        offers = read(_parsed(content))
    except (UnknownShape, ValueError) as error:
        raise SourceError(f"{name}: {error}") from error
    except RecursionError:
        raise SourceError(f"{name}: is nested too deep") from None
    if len(offers) > MOST_MODELS:
        raise SourceError(f"{name}: has more than {MOST_MODELS} models")
    return Source(name, upstream, offers)


def _parsed(content: bytes) -> object:
    """The JSON, its numbers exact: 3e-07 is no binary fraction. Raises ValueError."""
    try:
        return json.loads(content, parse_float=number, parse_int=_whole, parse_constant=_no_number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from None


def _whole(text: str) -> int:
    return int(number(text))


def _no_number(text: str) -> Never:
    raise ValueError(f"has {text}, which is no number")
