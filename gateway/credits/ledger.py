"""The ledger's entries as values, and what their sum says an account must look like.

``Entry`` is one movement of credits, ``Fold`` the sum of an account's entries in order, ``Live`` and ``Hold`` what the
store says of the account at one moment. Where the two disagree there is a ``Mismatch``.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Never

from gateway.credits.errors import EngineError
from gateway.domain.money import format_credits

#: Findings that one account can have; what goes wrong once tends to go wrong for every entry after it.
MOST_MISMATCHES = 20

_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
#: The year 10000, which no calendar here can show.
_END_OF_TIME_MS = 253_402_300_800_000
_REQUIRED = ("account", "sequence", "kind", "id", "time", "postings", "used_after", "balance_after")
_OPTIONAL = ("plan", "model", "key")
#: The kinds after which a window may have used anything: a window that a change of plan opens counts earlier use.
_WINDOW_KINDS = frozenset(("open", "refresh", "plan", "close"))


class BrokenEntry(EngineError):
    """An entry of a shard's stream that cannot be read. account: as far as it can be told, else empty. content: the
    fields as JSON, nothing of them left out."""

    def __init__(self, shard: int, stream_id: str, fields: Sequence[bytes], reason: str) -> None:
        super().__init__(f"entry {stream_id} of ledger stream {shard:02x} cannot be read: {reason}")
        self.shard = shard
        self.stream_id = stream_id
        texts = [text.decode("utf-8", "backslashreplace") for text in fields]
        self.account = dict(zip(texts[::2], texts[1::2], strict=False)).get("account", "").replace("\0", "")
        self.content = json.dumps(texts)


@dataclass(frozen=True, slots=True)
class Entry:
    """One movement of credits of one account.

    sequence: from 1, without gaps. id: of the reservation, operation or window. time_ms: the store's clock. postings:
    signed nano-credits by book, their sum 0. used_after: nano-credits used by length of window in ms. What a kind of
    entry does not have is empty. extra: what the stream said beyond all that, so that nothing of an entry is lost.
    """

    shard: int
    stream_id: str
    account: str
    sequence: int
    kind: str
    id: str
    time_ms: int
    postings: Mapping[str, int]
    used_after: Mapping[int, int]
    balance_after_nano: int
    plan: str = ""
    model: str = ""
    key: str = ""
    price_version: str = ""
    source: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def parse_entry(shard: int, stream_id: bytes, fields: Sequence[bytes]) -> Entry:
    """The entry that a stream holds under stream_id as names and values in turn. Raises BrokenEntry."""
    try:
        return _parse(shard, stream_id.decode(), fields)
    except (ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise BrokenEntry(shard, stream_id.decode(), fields, reason) from error


def _parse(shard: int, stream_id: str, fields: Sequence[bytes]) -> Entry:
    texts = [text.decode() for text in fields]
    if any("\0" in text for text in texts):
        raise ValueError("a NUL character is in it")
    values = dict(zip(texts[::2], texts[1::2], strict=True))
    if len(values) * 2 != len(texts):
        raise ValueError("a field is in it twice")
    account, sequence, kind, id_, time_ms, postings, used_after, balance_after = (values.pop(n) for n in _REQUIRED)
    optional = {name: values.pop(name, "") for name in _OPTIONAL}
    if not 0 <= _integer(time_ms) < _END_OF_TIME_MS:
        raise ValueError(f"{time_ms[:40]!r} is not a time")
    note = _note(values.pop("note", ""))
    known = {
        "price_version": _take_text(note, "price"),
        "source": _take_text(note, "source"),
        "reason": _take_text(note, "reason"),
    }
    tokens = _take_tokens(note)
    return Entry(
        shard=shard,
        stream_id=stream_id,
        account=account,
        sequence=_integer(sequence),
        kind=kind,
        id=id_,
        time_ms=_integer(time_ms),
        postings={book: _integer(nano) for book, nano in _pairs(postings.split(" ") if postings else [])},
        used_after=dict(_used(part) for part in used_after.split(" ") if part),
        balance_after_nano=_integer(balance_after),
        tokens=tokens,
        extra={**values, **({"note": note} if note else {})},
        **optional,
        **known,
    )


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a whole number")
    return int(text)


def _pairs(words: Sequence[str]) -> Iterable[tuple[str, str]]:
    pairs = list(zip(words[::2], words[1::2], strict=True))
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a book is in its postings twice")
    return pairs


def _used(text: str) -> tuple[int, int]:
    refresh, _, nano = text.partition(":")
    return _integer(refresh), _integer(nano)


def _note(text: str) -> dict[str, Any]:
    """The note's members. One that is no JSON object is a member of its own: no reason to lose the whole entry."""
    if not text:
        return {}
    try:
        note = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {"text": text}
    return note if isinstance(note, dict) else {"text": text}


def _refuse(constant: str) -> Never:
    # NaN does not equal itself: an archived entry would never be found equal to the one in the stream.
    raise ValueError(f"{constant} is not JSON")


def _take_text(note: dict[str, Any], name: str) -> str:
    value = note.get(name, "")
    # Lone surrogates come out of JSON escapes; no database takes them as text.
    if not isinstance(value, str) or "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return ""
    return str(note.pop(name, ""))


def _take_tokens(note: dict[str, Any]) -> dict[str, int]:
    tokens = note.get("tokens", {})
    if not isinstance(tokens, dict) or not all(type(count) is int for count in tokens.values()):
        return {}
    note.pop("tokens", None)
    return tokens


# --- what the store says of an account ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """One window of an account, as its hash has it, in nano-credits; epochs number an account's windows.

    held: by reservations made in it. before: by those of ended windows of this length. adopted: by those of the windows
    that this one replaced at changes of plan.
    """

    refresh_ms: int
    ends_ms: int
    granted_nano: int
    used_nano: int
    held_nano: int
    before_nano: int
    epoch: int
    first_epoch: int
    adopted_nano: int
    adopted_epochs: tuple[int, ...]


_TOTALS = ("spent", "written_off", "bought", "refunded", "deducted")


@dataclass(frozen=True, slots=True)
class Live:
    """An account's hash. totals: the lifetime sums by name."""

    account: str
    plan: str
    sequence: int
    balance_nano: int
    balance_held_nano: int
    windows: tuple[Window, ...]
    totals: Mapping[str, int]


def _read_window(text: str) -> Window:
    *figures, epochs = text.split("|")
    adopted = tuple(_integer(epoch) for epoch in epochs.split(",") if epoch)
    return Window(*map(_integer, figures), adopted)  # type: ignore[call-arg, arg-type]


def parse_live(account: str, values: Mapping[str, str]) -> Live:
    """The account whose hash has these fields. Raises ValueError where a figure is missing or none."""
    texts = [values[name] for name in ("w1", "w2", "w3", "w4") if name in values]
    if any(text.count("|") != 9 for text in texts):
        raise ValueError("a window does not have 10 fields")
    missing = [name for name in ("plan", "sequence") if name not in values]
    if missing:
        raise ValueError(f"there is no {missing[0]}")
    return Live(
        account=account,
        plan=values["plan"],
        sequence=_integer(values["sequence"]),
        balance_nano=_integer(values.get("balance", "0")),
        balance_held_nano=_integer(values.get("balance_held", "0")),
        windows=tuple(map(_read_window, texts)),
        totals={name: _integer(values.get(f"total_{name}", "0")) for name in _TOTALS},
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Allowance that a reservation holds, and the (refresh_ms, epoch) of the windows that it was held in."""

    amount_nano: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """What an open reservation holds."""

    account: str
    parts: tuple[Part, ...]
    from_balance_nano: int


def parse_hold(text: str) -> Hold | None:
    """What a reservation's record holds; None for one that has ended, and for what is no reservation. Raises ValueError
    for one that cannot be read."""
    if not text.startswith("open|"):
        return None
    _, account, parts, from_balance, *_ = text.split("|")
    return Hold(account, tuple(_part(part) for part in parts.split(";") if part), _integer(from_balance))


def _part(text: str) -> Part:
    amount, _, spans = text.partition("@")
    return Part(_integer(amount), tuple(_used(span) for span in spans.split(",") if span))


# --- the sum -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that does not agree. expected: what follows from the ledger or a rule. found: what there is. Amounts
    are decimal credits."""

    account: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"account {self.account}: {self.what}: expected {self.expected}, found {self.found}"


class Fold:
    """The sum of one account's entries, added in order of their sequence, and what did not agree on the way."""

    def __init__(self, account: str) -> None:
        self.account = account
        self.sequence = 0
        self.plan = ""
        self.books: dict[str, int] = defaultdict(int)
        self._mismatches: list[Mismatch] = []
        self._more = 0
        # What the latest entry said, not what was added up: one wrong entry is one finding.
        self._balance_nano = 0
        self._used: Mapping[int, int] = {}
        # Lengths of the windows, in ms as the entries have them: all, and those whose grant or use a change of plan
        # has touched. Only the latter may have used more than they grant.
        self._lengths: set[str] = set()
        self._regranted: set[str] = set()
        self._opened_ms = -1

    @property
    def mismatches(self) -> list[Mismatch]:
        """What was found so far, MOST_MISMATCHES at most, and then how many more there are."""
        more = [Mismatch(self.account, "further mismatches", "0", str(self._more))] if self._more else []
        return self._mismatches + more

    def found(self, what: str, expected: str, found: str) -> None:
        """Put something on the list that does not agree."""
        if len(self._mismatches) < MOST_MISMATCHES:
            self._mismatches.append(Mismatch(self.account, what, expected, found))
        else:
            self._more += 1

    def _amount(self, what: str, expected_nano: int, found_nano: int) -> None:
        if expected_nano != found_nano:
            self.found(what, format_credits(expected_nano), format_credits(found_nano))

    def add(self, entry: Entry) -> None:
        """Add the next entry of the account."""
        name = f"entry {entry.sequence} ({entry.kind} {entry.id})"
        if entry.sequence != self.sequence + 1:
            self.found("next entry of the ledger", f"sequence {self.sequence + 1}", f"sequence {entry.sequence}")
        self._amount(f"sum of the postings of {name}", 0, sum(entry.postings.values()))
        balance_nano = self._balance_nano + entry.postings.get("balance", 0)
        self._amount(f"balance after {name}", balance_nano, entry.balance_after_nano)
        if entry.kind not in _WINDOW_KINDS:
            for refresh_ms in self._used.keys() | entry.used_after.keys():
                used_nano = self._used.get(refresh_ms, 0) - entry.postings.get(f"window:{refresh_ms}", 0)
                what = f"used in {window_name(refresh_ms)} after {name}"
                self._amount(what, used_nano, entry.used_after.get(refresh_ms, 0))
        self._watch_grants(entry)
        self.sequence = entry.sequence
        self.plan = entry.plan or self.plan
        for book, nano in entry.postings.items():
            self.books[book] += nano
        self._balance_nano = entry.balance_after_nano
        self._used = entry.used_after

    def _watch_grants(self, entry: Entry) -> None:
        if entry.kind == "open":
            self._opened_ms = entry.time_ms
        elif entry.kind == "plan":
            self._regranted |= {str(refresh_ms) for refresh_ms in entry.used_after}
        elif entry.kind == "close":
            self._lengths.discard(entry.id)
        elif entry.kind == "refresh":
            length = entry.id.partition(":")[0]
            # What a window of a new length finds used and held was not admitted by its own grant.
            if length in self._lengths or entry.time_ms == self._opened_ms:
                self._regranted.discard(length)
            else:
                self._regranted.add(length)
            self._lengths.add(length)

    def compare(self, live: Live) -> None:
        """Find where the account's hash is not what its ledger, now complete, says."""
        books = self.books
        if self.sequence != live.sequence:
            self.found("entries of the ledger", str(live.sequence), str(self.sequence))
        if self.plan != live.plan:
            self.found("plan", self.plan or "none", live.plan)
        self._amount("balance", books["balance"], live.balance_nano)
        current = {str(window.refresh_ms) for window in live.windows}
        for window in live.windows:
            name, length = window_name(window.refresh_ms), window.refresh_ms
            self._amount(
                f"granted less used of {name}", books[f"window:{length}"], window.granted_nano - window.used_nano
            )
            self._amount(f"held before {name}", books[f"before:{length}"], window.before_nano)
            self._amount(f"used in {name}", self._used.get(length, 0), window.used_nano)
        for book in sorted(books):
            kind, _, refresh = book.partition(":")
            if kind in ("window", "before") and refresh not in current:
                self._amount(f"book {book} of a window that is over", 0, books[book])
        for total, nano in live.totals.items():
            sign = -1 if total in ("bought", "refunded") else 1  # sources of the balance give what it gets
            self._amount(f"total {total.replace('_', ' ')}", sign * books[total], nano)

    def check(self, live: Live, holds: Sequence[Hold]) -> None:
        """Find which rules the account breaks. holds: of all its open reservations at the same moment."""
        self._not_negative("balance held", live.balance_held_nano)
        if live.balance_held_nano > live.balance_nano:
            at_most = f"at most {format_credits(live.balance_nano)}, the balance"
            self.found("balance held", at_most, format_credits(live.balance_held_nano))
        held_nano = sum(hold.from_balance_nano for hold in holds)
        self._amount("balance held by open reservations", held_nano, live.balance_held_nano)
        parts = [part for hold in holds for part in hold.parts]
        for window in live.windows:
            self._check_window(window, parts)

    def _check_window(self, window: Window, parts: Sequence[Part]) -> None:
        name = window_name(window.refresh_ms)
        sums: dict[str | None, int] = defaultdict(int)
        for part in parts:
            sums[_holder(window, part)] += part.amount_nano
        for what, nano in (
            ("held", window.held_nano),
            ("adopted", window.adopted_nano),
            ("before", window.before_nano),
        ):
            self._amount(f"{what} in {name} by open reservations", sums[what], nano)
        self._not_negative(f"used in {name}", window.used_nano)
        self._not_negative(f"held in {name}", window.held_nano)
        taken_nano = window.used_nano + window.held_nano + window.adopted_nano
        if taken_nano > window.granted_nano and str(window.refresh_ms) not in self._regranted:
            at_most = f"at most {format_credits(window.granted_nano)}, what it grants"
            self.found(f"used and held in {name}", at_most, format_credits(taken_nano))

    def _not_negative(self, what: str, nano: int) -> None:
        if nano < 0:
            self.found(what, "0 or more", format_credits(nano))


def _holder(window: Window, part: Part) -> str | None:
    """Which of a window's figures a part's hold counts in; None where a later window never knew of it."""
    epochs = [epoch for _, epoch in part.spans]
    if window.epoch in epochs:
        return "held"
    if any(epoch in window.adopted_epochs for epoch in epochs):
        return "adopted"
    known = (refresh == window.refresh_ms and epoch >= window.first_epoch for refresh, epoch in part.spans)
    return "before" if any(known) else None


def window_name(refresh_ms: int) -> str:
    """A length of window for people, such as ``the 8 h window``."""
    hours, rest_ms = divmod(refresh_ms, 3_600_000)
    return f"the {hours} h window" if not rest_ms else f"the {refresh_ms} ms window"
