"""Moves the ledger from the store's streams into the archive: first it is durable there, then it is trimmed here.

Every gateway does this; what two of them move at once the archive takes once. Nothing is remembered between sweeps: a
sweep reads each stream from its start, so whatever a crash left half done is done again.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.archive_rows import Row, read_row
from gateway.credits.connection import Command
from gateway.credits.errors import StoreError, StoreUnavailable
from gateway.credits.keyspace import META, SHARDS, shard_keys
from gateway.credits.ledger import BrokenEntry
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

#: Between sweeps: what has come meanwhile goes in few transactions, which is what makes it cheap. With nothing to do, a
#: sweep is 256 XLEN in one write.
PAUSE_S = 1.0
#: The longest pause after failures.
RETRY_MOST_S = 30.0
#: Entries that are read at once, and trimmed at once: 0.15 ms of the loop's time and of the store's, for which requests
#: wait.
READ_AT_ONCE = 25
#: The longest rest after each, and all rests of a sweep together: so that hardly a request meets two of them. They
#: have a price: with them an entry takes 16 to 23 µs of CPU, without them 11, for the process need not wake up for each
#: step, with cold caches.
_REST_MOST_S, _RESTS_S = 0.005, 2.0
#: Streams whose lengths are asked for at once, for the same reason.
_LENGTHS_AT_ONCE = 64
#: Entries of one transaction. To commit 2000 takes SQLite's thread 2 to 5 ms at a stretch, in which the event loop may
#: wait for the same core: that was half of all answers that took over 3.5 ms. To commit 250 takes 0.5 ms.
TRANSACTION = 250
#: Where a sweep would need more transactions than this, because there is much or the database is slow, they are larger:
#: up to so many entries.
_TRANSACTIONS, _TRANSACTION_MOST = 40, 2000
#: Field of the store's META that says which archive its ledger goes to.
ARCHIVE_FIELD = "archive"
_STORE_FIELD = "id"

#: What XRANGE gives: ids, each with names and values in turn.
Batch = Sequence[tuple[bytes, list[bytes]]]


class ForeignArchive(ArchiveError):
    """The configured archive is not that of this store: the store's ledger goes to another one, or the archive has the
    ledger of another store."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: all gateways of a store must have the same archive, and each store an archive of its own. "
            "Set archive.url to an absolute sqlite:/// path or a postgresql:// URL"
        )


@asynccontextmanager
async def archiving(store: Store, archive: Archive, metrics: Metrics) -> AsyncIterator["Archiver"]:
    """Archive the ledger for the time of the block; closes the archive at its end. What is then not archived yet stays
    in the store. Raises nothing where the database is away: that is logged and tried again."""
    archiver = Archiver(store, archive, metrics)
    task = asyncio.create_task(_archive_forever(archiver, metrics), name="ledger-archiver")
    try:
        yield archiver
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await archive.close()


async def _archive_forever(archiver: "Archiver", metrics: Metrics) -> None:
    pause_s, failing = PAUSE_S, False
    while True:
        try:
            await archiver.sweep()
        except StoreUnavailable as error:  # others say so louder
            log.debug("the ledger is archived later: %s", error)
        except Exception as error:
            metrics.ledger_archive_failed()
            failing = True
            pause_s = min(pause_s * 2, RETRY_MOST_S)
            if isinstance(error, (ArchiveError, StoreError)):
                log.error("the ledger stays in the store, which grows: %s", error)
            else:
                log.exception("the ledger stays in the store, which grows")
        else:
            if failing:
                log.info("the ledger is archived again")
            pause_s, failing = PAUSE_S, False
        # Not all gateways at the same moment.
        await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311


class Archiver:
    """Moves what there is.

    quiet: asked after each step; while it says that no requests come, no rest is taken.
    """

    def __init__(self, store: Store, archive: Archive, metrics: Metrics) -> None:
        self._store = store
        self._archive = archive
        self._metrics = metrics
        self.quiet: Callable[[], bool] = lambda: False

    async def sweep(self) -> None:
        """Archive and trim what there is when it begins.

        Raises StoreError, ArchiveError and ForeignArchive; nothing is trimmed then that is not archived.
        """
        lengths: list[int] = []
        for first in range(0, SHARDS, _LENGTHS_AT_ONCE):
            some = range(first, first + _LENGTHS_AT_ONCE)
            lengths += await self._store.call_all([("XLEN", shard_keys(shard).ledger) for shard in some])
        if not any(lengths):
            return
        await self.claim()
        taken, entries = _Taken(), sum(lengths)
        rest_s = min(_REST_MOST_S, _RESTS_S / (2 * -(-entries // READ_AT_ONCE)))
        at_once = min(max(TRANSACTION, entries // _TRANSACTIONS), _TRANSACTION_MOST)
        for counts in _reads(lengths):
            await self._read(counts, taken)
            await self._rest(rest_s)
            if taken.entries >= at_once:
                await self._move(taken, rest_s)
                taken = _Taken()
        await self._move(taken, rest_s)

    async def claim(self) -> None:
        """Tie store and archive together for ever, unless they are. Raises StoreError, ArchiveError, ForeignArchive."""
        own = await self._archive.open()
        store_id = await self._first(_STORE_FIELD, secrets.token_hex(12))
        if await self._archive.of_store(store_id) != store_id:
            raise ForeignArchive("the archive that archive.url names has the ledger of another store")
        if await self._first(ARCHIVE_FIELD, own) != own:
            raise ForeignArchive("this store's ledger goes to another archive than the one that archive.url names")

    async def _first(self, field: str, value: str) -> str:
        kept = await self._store.call("HGET", META, field)
        if kept is None:
            # Only now: a store whose memory is full refuses this write, and trimming is what makes room.
            await self._store.call("HSETNX", META, field, value)
            kept = await self._store.call("HGET", META, field)
        return str(kept.decode())

    async def _read(self, counts: dict[int, int], taken: "_Taken") -> None:
        replies = await self._store.call_all(
            [
                ("XRANGE", stream := shard_keys(shard).ledger, taken.after(stream), "+", "COUNT", count)
                for shard, count in counts.items()
            ]
        )
        taken.add(zip(counts, replies, strict=True))

    async def _move(self, taken: "_Taken", rest_s: float) -> None:
        if taken.entries:
            self._metrics.ledger_archived(await self._archive.append(taken.rows, taken.broken))
            # Exactly what was archived, by id. A trim by the last id would also take entries that a replica, made
            # primary since they were read, has given smaller ids.
            for trims in taken.trims:
                await self._store.call_all(trims)
                await self._rest(rest_s)

    async def _rest(self, seconds: float) -> None:
        if not self.quiet():
            await asyncio.sleep(seconds)


class _Taken:
    """What one transaction takes. trims: what takes it from the streams, as much at once as was read at once."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.broken: list[BrokenEntry] = []
        self.trims: list[list[Command]] = []
        self._last: dict[str, bytes] = {}

    @property
    def entries(self) -> int:
        """How many there are."""
        return len(self.rows) + len(self.broken)

    def after(self, stream: str) -> bytes:
        """Where XRANGE goes on."""
        return b"(" + self._last[stream] if stream in self._last else b"-"

    def add(self, batches: Iterable[tuple[int, Batch]]) -> None:
        """Take more entries, by shard."""
        trims: list[Command] = []
        for shard, batch in batches:
            for stream_id, words in batch:
                try:
                    self.rows.append(read_row(shard, stream_id, words))
                except BrokenEntry as error:
                    self.broken.append(error)
            if batch:
                stream = shard_keys(shard).ledger
                trims.append(("XDEL", stream, *(stream_id for stream_id, _ in batch)))
                self._last[stream] = batch[-1][0]
        self.trims.append(trims)


def _reads(lengths: Sequence[int]) -> Iterator[dict[int, int]]:
    """What to read at once: how many entries of which shards."""
    counts: dict[int, int] = {}
    room = READ_AT_ONCE
    for shard, length in enumerate(lengths):
        left = length
        while left:
            counts[shard] = min(left, room)
            left -= counts[shard]
            room -= counts[shard]
            if not room:
                yield counts
                counts, room = {}, READ_AT_ONCE
    if counts:
        yield counts
