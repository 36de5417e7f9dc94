"""Ends reservations whose lease has run out: those of a gateway that died, or whose reply was lost."""

import asyncio
import logging

from gateway.credits.errors import StoreError
from gateway.credits.keyspace import SHARDS
from gateway.credits.service import CreditEngine

log = logging.getLogger(__name__)

#: One sweep over all shards takes this long, so that a lease ends at most this much late.
SWEEP_S = 4.0
_SHARDS_AT_ONCE = 16


async def reap(engine: CreditEngine) -> None:
    """Sweep for ever. Every gateway sweeps; the script checks the lease again, so they do not collide."""
    while True:
        for first in range(0, SHARDS, _SHARDS_AT_ONCE):
            try:
                await asyncio.gather(*(engine.expire_due(shard) for shard in range(first, first + _SHARDS_AT_ONCE)))
            except StoreError as error:
                log.debug("the sweep is put off: %s", error)
            except Exception:  # whatever it is: without sweeps no lease would end any more
                log.exception("the sweep of shards %d to %d failed", first, first + _SHARDS_AT_ONCE - 1)
            await asyncio.sleep(SWEEP_S * _SHARDS_AT_ONCE / SHARDS)
