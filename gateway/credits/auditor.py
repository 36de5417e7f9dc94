"""Reads the whole ledger, from the archive and from the store's streams, and audits accounts against it.

Both change while they are read: the archiver moves entries from the streams into the archive. The order of reading
makes that harmless. First the accounts, which say how far the ledger goes; then the archive; then the stream; and what
is in neither by then was moved in between, so it is in the archive now.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gateway.credits.archive import Archive, Period
from gateway.credits.archiver import ARCHIVE_FIELD, ForeignArchive
from gateway.credits.errors import UnknownAccount
from gateway.credits.keyspace import ACCOUNT_PATTERN, META, account_key, shard_keys, shard_of
from gateway.credits.ledger import BrokenEntry, Entry, Fold, Hold, Live, Mismatch, parse_entry, parse_hold, parse_live
from gateway.credits.store import Store

_PAGE = 1000
#: How often the holds of an account are read again because it changed meanwhile, and the pause before.
_SNAPSHOT_TRIES, _SNAPSHOT_PAUSE_S = 20, 0.05
_FOLLOW_PAUSE_S = 0.5
_EVER = Period()

Complain = Callable[[BrokenEntry], None]


@dataclass(frozen=True, slots=True)
class Span:
    """Entries of one account to read: after < sequence ≤ upto."""

    after: int
    upto: int


@dataclass(slots=True)
class Audit:
    """What ``verify`` found. unchecked: accounts whose holds changed too fast to be compared; all else of them was.
    lost: (account, what) of archived entries that the store lost in a failover; what it has since is what counts."""

    accounts: int = 0
    entries: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """An account's hash at one moment, and what its open reservations held then; None where that was not to be had."""

    values: Mapping[str, str]
    holds: list[Hold] | None


@asynccontextmanager
async def auditing(store: Store, url: str, data_dir: Path) -> AsyncIterator["Auditor"]:
    """An Auditor of a started store and the archive at url, as ``Archive`` takes it. Raises ArchiveError."""
    archive = Archive(url, data_dir)
    try:
        yield Auditor(store, archive)
    finally:
        await archive.close()


class Auditor:
    """Reads the ledger of a store and its archive. All raise StoreError and ArchiveError; ForeignArchive where the
    store's ledger goes to another archive."""

    def __init__(self, store: Store, archive: Archive) -> None:
        self._store = store
        self._archive = archive

    # --- reading ------------------------------------------------------------------------------------------------

    async def tail(self, account: str, count: int) -> list[Entry]:
        """The account's last count entries, oldest first. Raises UnknownAccount, BrokenEntry."""
        await self.check_archive()
        last = await self.last_sequence(account)
        return [one async for one in self._read_one(account, Span(max(0, last - count), last), _EVER)]

    async def follow(self, account: str, after: int) -> AsyncIterator[Entry]:
        """The account's entries with a sequence above after, for ever, as they are made. Raises as tail does."""
        while True:
            last = await self.last_sequence(account)
            if last > after:
                async for entry in self._read_one(account, Span(after, last), _EVER):
                    yield entry
                after = last
            await asyncio.sleep(_FOLLOW_PAUSE_S)

    async def export(self, account: str | None, period: Period) -> AsyncIterator[Entry]:
        """Every entry of the period that was made before this began, of one account or all; those of one account in
        order. Holds no more than a page of them at a time. Raises UnknownAccount, BrokenEntry."""
        await self.check_archive()
        if account is not None:
            async for entry in self._read_one(account, Span(0, await self.last_sequence(account)), period):
                yield entry
            return
        for shard, names in _by_shard(await self._store.scan(ACCOUNT_PATTERN)):
            sequences = await asyncio.gather(*(self.last_sequence(name) for name in names))
            spans = {name: Span(0, last) for name, last in zip(names, sequences, strict=True)}
            async for entry in self._read(shard, spans, period, _raise):
                yield entry

    async def last_sequence(self, account: str) -> int:
        """The number of the account's latest entry. Raises UnknownAccount."""
        reply = await self._store.call("HGET", account_key(account), "sequence")
        if reply is None:
            raise UnknownAccount(account)
        return int(reply)

    async def check_archive(self) -> bool:
        """Whether the store's ledger goes to this archive; False where it goes to none yet. Raises ForeignArchive where
        it goes to another one."""
        owner = await self._store.call("HGET", META, ARCHIVE_FIELD)
        if owner is None:
            return False
        if await self._archive.find() != owner.decode():
            raise ForeignArchive("this store's ledger goes to another archive than the one that archive.url names")
        return True

    async def _read_one(self, account: str, span: Span, period: Period) -> AsyncIterator[Entry]:
        def complain(error: BrokenEntry) -> None:
            if error.account == account:
                raise error

        async for entry in self._read(shard_of(account), {account: span}, period, complain):
            yield entry

    async def _read(
        self, shard: int, spans: Mapping[str, Span], period: Period, complain: Complain
    ) -> AsyncIterator[Entry]:
        """The entries of accounts of one shard, those of each account in order, none missing and none twice."""
        last: dict[str, int] = {}
        for account, span in spans.items():
            last[account] = span.after
            async for entry in self._archived(account, span, period):
                last[account] = entry.sequence
                yield entry
        async for entry in self._streamed(shard, complain):
            account = entry.account
            if account not in spans or not last[account] < entry.sequence <= spans[account].upto:
                continue
            if entry.sequence > last[account] + 1:
                async for moved in self._archived(account, Span(last[account], entry.sequence - 1), period):
                    yield moved
            last[account] = entry.sequence
            if period.has(entry):
                yield entry
        for account, span in spans.items():
            if last[account] < span.upto:
                async for moved in self._archived(account, Span(last[account], span.upto), period):
                    yield moved

    async def _archived(self, account: str, span: Span, period: Period) -> AsyncIterator[Entry]:
        after = span.after
        while True:
            page = await self._archive.entries(account, after, span.upto, period, _PAGE)
            for entry in page:
                yield entry
            if len(page) < _PAGE:
                return
            after = page[-1].sequence

    async def _streamed(self, shard: int, complain: Complain) -> AsyncIterator[Entry]:
        start = "-"
        while True:
            page = await self._store.call("XRANGE", shard_keys(shard).ledger, start, "+", "COUNT", _PAGE)
            for stream_id, fields in page:
                try:
                    entry = parse_entry(shard, stream_id, fields)
                except BrokenEntry as error:
                    complain(error)
                else:
                    yield entry
            if len(page) < _PAGE:
                return
            start = f"({page[-1][0].decode()}"

    # --- auditing -----------------------------------------------------------------------------------------------

    async def verify(self, account: str | None = None) -> Audit:
        """Sum up the ledger of one account or of all, and compare. Raises UnknownAccount."""
        await self.check_archive()
        # Before the accounts: an account can only be ahead of this, unless the store has lost what the archive has.
        archived = await self._archive.last_sequences(account)
        live = await self._store.scan(ACCOUNT_PATTERN) if account is None else [account_key(account)]
        audit = Audit()
        for shard, names in _by_shard([*live, *(account_key(name) for name in archived)]):
            await self._verify_shard(shard, names, archived, audit)
        if account is not None and not audit.accounts:
            raise UnknownAccount(account)
        for name, reason in await self._archive.conflicts(account):
            audit.mismatches.append(Mismatch(name, "entries that conflict", "none", reason))
        audit.lost = await self._archive.lost(account)
        return audit

    async def _verify_shard(self, shard: int, names: list[str], archived: Mapping[str, int], audit: Audit) -> None:
        snapshots = await self._snapshots(shard, names)
        folds, lives = {}, {}
        for name in names:
            snapshot = snapshots[name]
            if not snapshot.values and name not in archived:
                continue
            audit.accounts += 1
            fold = folds[name] = Fold(name)
            try:
                live = lives[name] = parse_live(name, snapshot.values) if snapshot.values else None
            except ValueError as error:
                fold.found("hash in the store", "one that can be read", str(error))
            else:
                if live is None:
                    fold.found("hash in the store", f"sequence {archived[name]} or later", "none")
                elif live.sequence < archived.get(name, 0):
                    found = f"{live.sequence}: the store has gone back"
                    fold.found("sequence", f"{archived[name]} or later", found)

        def complain(error: BrokenEntry) -> None:
            if error.account in folds:
                folds[error.account].found(f"stream entry {error.stream_id}", "one that can be read", str(error))

        spans = {name: Span(0, live.sequence) for name, live in lives.items() if live is not None}
        async for entry in self._read(shard, spans, _EVER, complain):
            folds[entry.account].add(entry)
            audit.entries += 1
        for name, fold in folds.items():
            _judge(fold, lives.get(name), snapshots[name].holds, audit)

    async def _snapshots(self, shard: int, names: Iterable[str]) -> dict[str, _Snapshot]:
        """Each account's hash with its holds. They are read one after the other, so they belong together only where the
        hash was the same before and after."""
        waiting = set(names)
        snapshots: dict[str, _Snapshot] = {}
        for _ in range(_SNAPSHOT_TRIES):
            before = await self._hashes(waiting)
            holds = await self._holds(shard, waiting)
            after = await self._hashes(waiting)
            for name in list(waiting):
                if before[name] == after[name]:
                    snapshots[name] = _Snapshot(after[name], holds[name])
                    waiting.remove(name)
            if not waiting:
                return snapshots
            await asyncio.sleep(_SNAPSHOT_PAUSE_S)
        return snapshots | {name: _Snapshot(values, None) for name, values in (await self._hashes(waiting)).items()}

    async def _hashes(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        names = list(names)
        hashes = {}
        for first in range(0, len(names), _PAGE):
            page = names[first : first + _PAGE]
            replies = await asyncio.gather(*(self._store.call("HGETALL", account_key(name)) for name in page))
            for name, reply in zip(page, replies, strict=True):
                texts = [text.decode("utf-8", "replace") for text in reply]
                hashes[name] = dict(zip(texts[::2], texts[1::2], strict=True))
        return hashes

    async def _holds(self, shard: int, names: Iterable[str]) -> dict[str, list[Hold]]:
        # By id: a scan may show a record twice.
        found: dict[bytes, Hold] = {}
        cursor: bytes = b"0"
        while True:
            cursor, flat = await self._store.call("HSCAN", shard_keys(shard).records, cursor, "COUNT", _PAGE)
            for name, text in zip(flat[::2], flat[1::2], strict=True):
                try:
                    hold = parse_hold(text.decode("utf-8", "replace"))
                except ValueError:
                    continue  # what it holds is then missing from the account's sum, and that is found
                if hold is not None:
                    found[name] = hold
            if cursor == b"0":
                break
        holds: dict[str, list[Hold]] = {name: [] for name in names}
        for hold in found.values():
            if hold.account in holds:
                holds[hold.account].append(hold)
        return holds


def _judge(fold: Fold, live: Live | None, holds: list[Hold] | None, audit: Audit) -> None:
    if live is not None:
        fold.compare(live)
        if holds is None:
            audit.unchecked.append(live.account)
        else:
            fold.check(live, holds)
    audit.mismatches += fold.mismatches


def _raise(error: BrokenEntry) -> None:
    raise error


def _by_shard(keys: Iterable[str]) -> list[tuple[int, list[str]]]:
    """The accounts whose keys these are, sorted, by their shards."""
    shards: dict[int, set[str]] = {}
    for key in keys:
        name = key.split(":account:", 1)[1]
        shards.setdefault(shard_of(name), set()).add(name)
    return [(shard, sorted(names)) for shard, names in sorted(shards.items())]
