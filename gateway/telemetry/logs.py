"""Logs: one JSON object per line on stderr.

orjson escapes every control character, so that nothing a client sends can start a line of its own.
"""

import asyncio
import logging
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from select import PIPE_BUF
from typing import Any

import orjson

from gateway.domain.money import format_credits

_requests = logging.getLogger("gateway.requests")

#: The longest text taken from a request; a longer one is cut, so that a client cannot fill the disk with a name.
MAX_TEXT = 200


#: What every line of this process tells: the number of a worker, where there are several.
_process: dict[str, object] = {}


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: time (UTC), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        line: dict[str, Any] = {
            "time": _moment(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _encodable(record.getMessage()),
            **_process,
        }
        if record.exc_info:
            line["exception"] = _encodable(self.formatException(record.exc_info))
        return orjson.dumps(line).decode()


def setup_logging(level: str, worker: int | None = None) -> None:
    """Send every log record of the process at level (``info``, …) or above to stderr as JSON lines.

    worker: the number that each line names, of a process of several. Lines are written whole, so that those of several
    processes do not mix. Replaces the handlers that were there. Raises ValueError for a level that logging does not
    know.
    """
    if worker is not None:
        _process["worker"] = worker
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What it reports is malformed HTTP, by quoting the line, which may be the one with the customer's key.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def log_request(
    *,
    request_id: str,
    account: str | None,
    key_id: str | None,
    model: str | None,
    status: int,
    decision: str,
    reason: str | None = None,
    reserved_nano: int | None = None,
    cost_nano: int | None = None,
    seconds: float,
    overhead_seconds: float | None = None,
    first_token_seconds: float | None = None,
) -> None:
    """Log one request that was answered; the line is written in the next turn of the event loop that runs.

    account, key_id, model: None before they are known; key_id is the key's name, never its secret. Amounts appear
    as decimal strings of credits. seconds: the whole request; overhead_seconds: the gateway's own part of it.
    """
    if not _requests.isEnabledFor(logging.INFO):
        return
    now = time.time()
    second = int(now)
    begin, then = _around_moment(second)
    number = request_id if request_id.isidentifier() and len(request_id) <= MAX_TEXT else _escaped(request_id)
    # No memo of what others may write at any length: an upstream's reason, a client's name of a model.
    known = _known if reason is None and (model is None or len(model) <= MAX_TEXT) else _known.__wrapped__
    reserved = "null" if reserved_nano is None else f'"{format_credits(reserved_nano)}"'
    cost = "null" if cost_nano is None else f'"{format_credits(cost_nano)}"'
    overhead = "null" if overhead_seconds is None else f"{overhead_seconds:.6f}"
    first_token = "null" if first_token_seconds is None else f"{first_token_seconds:.6f}"
    # Put together as text, of memos where it can be: 18 k instructions, where a dict took 30 k.
    line = (
        f'{begin}{_MILLISECONDS[int((now - second) * 1000)]}{then}"{number}",'
        f'{known(account, key_id, model, status, decision, reason)},"reserved":{reserved},"cost":{cost},'
        f'"seconds":{seconds:.6f},"overhead_seconds":{overhead},"first_token_seconds":{first_token}}}\n'
    )
    # The line of every request goes past the logging package, which takes 21 µs for it: this takes 3 µs.
    if not _unwritten:
        asyncio.get_running_loop().call_soon(_write)
    _unwritten.append(line.encode())


@lru_cache(maxsize=2)
def _around_moment(second: int) -> tuple[str, str]:
    """What stands in the line of a request before the fraction of its second, and from there to its id."""
    constant = {"level": "info", "logger": _requests.name, "message": "request", **_process}
    return f'{{"time":"{_second(second)}', f'",{_members(constant)},"request_id":'


@lru_cache(maxsize=4096)
def _known(
    account: str | None, key_id: str | None, model: str | None, status: int, decision: str, reason: str | None
) -> str:
    """The members of a line that many requests have in common."""
    names = {"account": account, "key_id": key_id, "model": model}
    told = {name: text and _text(text) for name, text in names.items()}
    return _members({**told, "status": status, "decision": decision, "reason": reason})


def _members(members: dict[str, Any]) -> str:
    return orjson.dumps(members)[1:-1].decode()


def _escaped(text: str) -> str:
    return orjson.dumps(_text(text))[1:-1].decode()


#: Lines of requests that ended in this turn of the event loop: to write each by itself takes 3 µs.
_unwritten: list[bytes] = []


def _write() -> None:
    text = b"".join(_unwritten)
    blocks = [text] if len(text) <= PIPE_BUF else _blocks(_unwritten)
    try:
        for block in blocks:
            sys.stderr.buffer.write(block)
            sys.stderr.buffer.flush()
    except (OSError, ValueError, AttributeError):
        return  # a stderr that is closed, or not there, fails no request
    finally:
        _unwritten.clear()


def _blocks(lines: list[bytes]) -> list[bytes]:
    """The lines in blocks that the kernel does not mix with what other processes write into the same pipe."""
    blocks = [b""]
    for line in lines:
        if len(blocks[-1]) + len(line) > PIPE_BUF:
            blocks.append(b"")
        blocks[-1] += line
    return blocks


_MILLISECONDS = [f".{ms:03d}+00:00" for ms in range(1000)]


def _moment(epoch_ms: int) -> str:
    return _second(epoch_ms // 1000) + _MILLISECONDS[epoch_ms % 1000]


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _text(text: str) -> str:
    return text if len(text) <= MAX_TEXT and text.isascii() else _encodable(text[:MAX_TEXT])


def _encodable(text: str) -> str:
    # Header values that were not UTF-8 arrive with lone surrogates, which JSON cannot carry.
    return text.encode("utf-8", "backslashreplace").decode()
