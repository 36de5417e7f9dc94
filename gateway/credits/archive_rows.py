"""The archive's rows: the columns of ``Entry`` in their order, mappings as JSON text."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

from gateway.credits.ledger import Entry, parse_entry

Row = tuple[Any, ...]

COLUMNS = tuple(column.name for column in fields(Entry))
INTEGERS = frozenset(column.name for column in fields(Entry) if column.type is int)
_values_of = attrgetter(*COLUMNS)
_MAPPINGS = ("postings", "used_after", "tokens", "extra")

_TEXT = r"([^\0]*+)"
_PLAIN = r'([^"\\\0-\x1f]*+)'  # JSON text without escapes
_NUMBER = r"-?+[1-9][0-9]{0,17}+"  # whole, as JSON has it; scripts and gateway leave out what is 0
_BOOK = r"[a-z_:0-9]++"
_USED = rf"[0-9]++:(?:0|{_NUMBER})"
_TOKENS = rf'"[a-z_]++":{_NUMBER}'
#: What settle.lua writes for a request, in its order. Nothing that this takes needs the care of ``parse_entry``.
_ORDINARY = {
    "account": _TEXT,
    "sequence": r"([0-9]{1,18}+)",
    "kind": "settle",
    "id": _TEXT,
    "time": r"([0-9]{1,14}+)",
    "postings": rf"({_BOOK}) ({_NUMBER}) ({_BOOK}) ({_NUMBER})((?: {_BOOK} {_NUMBER})*+)",
    "used_after": rf"((?:{_USED}(?: {_USED})*+)?+)",
    "balance_after": r"(-?+[0-9]{1,18}+)",
    "model": _TEXT,
    "key": _TEXT,
    "note": rf'\{{"price":"{_PLAIN}","tokens":(\{{(?:{_TOKENS}(?:,{_TOKENS})*+)?+\}}),"source":"{_PLAIN}"\}}',
}
#: All names and values at once, a NUL between them, which none of them may hold.
_ORDINARY_WORDS = re.compile(r"\0".join([rf"{name}\0{text}" for name, text in _ORDINARY.items()]))


def read_row(shard: int, stream_id: bytes, words: Sequence[bytes]) -> Row:
    """The row of the entry that a stream holds under stream_id as names and values in turn. Raises BrokenEntry."""
    return ordinary_row(shard, stream_id, words) or row_of(parse_entry(shard, stream_id, words))


def ordinary_row(shard: int, stream_id: bytes, words: Sequence[bytes]) -> Row | None:
    """The row that ``row_of`` would give of the parsed entry, or None for an entry that is not an ordinary one.

    Every request leaves an ordinary one. Its mappings become JSON text without being anything between: 30 k
    instructions, where parsing it takes ten times as many.
    """
    if len(words) != 2 * len(_ORDINARY):
        return None
    try:
        match = _ORDINARY_WORDS.fullmatch(b"\0".join(words).decode())
    except UnicodeDecodeError:
        return None
    if match is None:
        return None
    (
        account, sequence, id_, time_ms, book, nano, other, other_nano, more, used, balance_nano, model, key,
        price, tokens, source,
    ) = match.groups()  # fmt: skip
    if more:
        posted = [book, nano, other, other_nano, *more[1:].split(" ")]
        if len(set(posted[::2])) * 2 != len(posted):
            return None
        postings = _members(len(posted)) % tuple(posted)
    elif book == other:
        return None
    else:  # as most are: a quarter of the work
        postings = f'{{"{book}":{nano},"{other}":{other_nano}}}'
    return (
        shard,
        stream_id.decode(),
        account,
        int(sequence),
        "settle",
        id_,
        int(time_ms),
        postings,
        '{"' + used.replace(":", '":').replace(" ", ',"') + "}" if used else "{}",
        int(balance_nano),
        "",
        model,
        key,
        price,
        source,
        tokens,
        "",
        "{}",
    )


@lru_cache(maxsize=64)
def _members(words: int) -> str:
    return "{" + ",".join(['"%s":%s'] * (words // 2)) + "}"


def row_of(entry: Entry) -> Row:
    """The row of an entry."""
    return tuple([_json(value) if isinstance(value, dict) else value for value in _values_of(entry)])


def _json(value: dict[Any, Any]) -> str:
    return json.dumps(value, separators=(",", ":")) if value else "{}"


def entry_of(row: Sequence[Any]) -> Entry:
    """The entry of a row."""
    values = dict(zip(COLUMNS, row, strict=True))
    for name in _MAPPINGS:
        values[name] = json.loads(values[name])
    values["used_after"] = {int(refresh_ms): nano for refresh_ms, nano in values["used_after"].items()}
    return Entry(**values)
