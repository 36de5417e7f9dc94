"""Moves the ledger from the store's streams into the archive: first it is durable there, then it is trimmed here.

Every gateway does this; what two of them move at once the archive takes once. Nothing is remembered between sweeps: a
sweep reads each stream from its start, so whatever a crash left half done is done again.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.errors import StoreError, StoreUnavailable
from gateway.credits.keyspace import META, SHARDS, shard_keys
from gateway.credits.ledger import BrokenEntry, Entry, parse_entry
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

#: With nothing to do, a sweep is 256 XLEN in one write.
IDLE_S = 2.0
#: The longest pause after failures.
RETRY_MOST_S = 30.0
#: Entries that one transaction takes at most are these two multiplied.
SHARD_BATCH = 250
_SHARDS_AT_ONCE = 8
#: Field of the store's META that says which archive its ledger goes to.
ARCHIVE_FIELD = "archive"
_STORE_FIELD = "id"


class ForeignArchive(ArchiveError):
    """The configured archive is not that of this store: the store's ledger goes to another one, or the archive has the
    ledger of another store."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: all gateways of a store must have the same archive, and each store an archive of its own. "
            "Set archive.url to an absolute sqlite:/// path or a postgresql:// URL"
        )


@asynccontextmanager
async def archiving(store: Store, archive: Archive, metrics: Metrics) -> AsyncIterator[None]:
    """Archive the ledger for the time of the block; closes the archive at its end. What is then not archived yet stays
    in the store. Raises nothing where the database is away: that is logged and tried again."""
    task = asyncio.create_task(archive_forever(store, archive, metrics), name="ledger-archiver")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await archive.close()


async def archive_forever(store: Store, archive: Archive, metrics: Metrics) -> None:
    """Sweep for ever."""
    archiver = Archiver(store, archive, metrics)
    pause_s, failing = IDLE_S, False
    while True:
        try:
            more = await archiver.sweep()
        except StoreUnavailable as error:  # others say so louder
            log.debug("the ledger is archived later: %s", error)
            more = False
        except Exception as error:
            metrics.ledger_archive_failed()
            failing, more = True, False
            pause_s = min(pause_s * 2, RETRY_MOST_S)
            if isinstance(error, (ArchiveError, StoreError)):
                log.error("the ledger stays in the store, which grows: %s", error)
            else:
                log.exception("the ledger stays in the store, which grows")
        else:
            if failing:
                log.info("the ledger is archived again")
            pause_s, failing = IDLE_S, False
        if not more:
            # Not all gateways at the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311


class Archiver:
    """Moves what there is."""

    def __init__(self, store: Store, archive: Archive, metrics: Metrics) -> None:
        self._store = store
        self._archive = archive
        self._metrics = metrics

    async def sweep(self) -> bool:
        """Archive and trim a batch of every shard that has one; whether there may be more.

        Raises StoreError, ArchiveError and ForeignArchive; nothing is trimmed then that is not archived.
        """
        lengths: list[int] = await asyncio.gather(
            *(self._store.call("XLEN", shard_keys(shard).ledger) for shard in range(SHARDS))
        )
        waiting = [shard for shard, length in enumerate(lengths) if length]
        if not waiting:
            return False
        await self.claim()
        for first in range(0, len(waiting), _SHARDS_AT_ONCE):
            await self._move(waiting[first : first + _SHARDS_AT_ONCE])
        return max(lengths) > SHARD_BATCH

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

    async def _move(self, shards: Sequence[int]) -> None:
        streams = [shard_keys(shard).ledger for shard in shards]
        batches = await asyncio.gather(
            *(self._store.call("XRANGE", stream, "-", "+", "COUNT", SHARD_BATCH) for stream in streams)
        )
        entries: list[Entry] = []
        broken: list[BrokenEntry] = []
        for shard, batch in zip(shards, batches, strict=True):
            for stream_id, fields in batch:
                try:
                    entries.append(parse_entry(shard, stream_id, fields))
                except BrokenEntry as error:
                    broken.append(error)
            await asyncio.sleep(0)  # a batch takes milliseconds of the loop; all of them would be felt
        self._metrics.ledger_archived(await self._archive.append(entries, broken))
        # Exactly what was archived, by id. A trim by the last id would also take entries that a replica, made primary
        # since the batch was read, has given smaller ids.
        await asyncio.gather(
            *(
                self._store.call("XDEL", stream, *(stream_id for stream_id, _ in batch))
                for stream, batch in zip(streams, batches, strict=True)
                if batch
            )
        )
