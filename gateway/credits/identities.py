"""Who a secret belongs to, remembered for a minute."""

import time
from collections import OrderedDict
from typing import Literal

from gateway.credits.api_keys import KeyDigest, digest_of
from gateway.credits.keyspace import shard_keys
from gateway.credits.store import Store
from gateway.domain.value import value

_TTL_S = 60.0  # a revoked key is refused at once by the reservation itself; this bounds the free endpoints
_MOST = 10_000


@value(frozen=True, slots=True)
class Identity:
    """Who sends a request. source: what its key is for."""

    account: str
    key_id: str
    source: Literal["api", "chat"] = "api"


class Identities:
    """The index from secrets to accounts, as far as it was asked lately."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[Identity, float]] = OrderedDict()

    async def of(self, secret: str) -> Identity | None:
        """Whose secret this is. Raises StoreUnavailable."""
        digest = digest_of(secret)
        known = self._known.get(digest.hex)
        if known and known[1] > time.monotonic():
            return known[0]
        identity = await self._look_up(digest)
        if identity is not None:
            self._known[digest.hex] = (identity, time.monotonic() + _TTL_S)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        return identity

    def forget(self) -> None:
        """Ask the store again from now on."""
        self._known.clear()

    async def _look_up(self, digest: KeyDigest) -> Identity | None:
        entry = await self._store.call("HGET", shard_keys(digest.shard).api_keys, digest.id)
        if entry is None:
            return None
        account, stored_hex, *source = entry.decode().split("|")
        if not digest.matches(stored_hex):
            return None
        return Identity(account, digest.id, "chat" if source == ["chat"] else "api")
