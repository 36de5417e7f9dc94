"""Who a secret belongs to, remembered for a minute."""

import time
from collections import OrderedDict
from hashlib import blake2s
from typing import Literal

from gateway.credits.api_keys import KeyDigest, digest_of
from gateway.credits.keyspace import shard_keys
from gateway.credits.store import Store
from gateway.domain.value import value

_TTL_S = 60.0  # a revoked key is refused at once by the reservation itself; this bounds the free endpoints
_MOST = 10_000
_NOBODY = None, 0.0


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
        self._known: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()

    def known(self, secret: str) -> Identity | None:
        """Whose secret this is, if that was asked lately."""
        identity, until = self._known.get(_mark_of(secret), _NOBODY)
        return identity if until > time.monotonic() else None

    async def look_up(self, secret: str) -> Identity | None:
        """Whose secret this is, by the store. Raises StoreUnavailable."""
        digest = digest_of(secret)
        identity = await self._stored(digest)
        if identity is not None:
            self._known[_mark_of(secret)] = (identity, time.monotonic() + _TTL_S)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        return identity

    def forget(self) -> None:
        """Ask the store again from now on."""
        self._known.clear()

    async def _stored(self, digest: KeyDigest) -> Identity | None:
        entry = await self._store.call("HGET", shard_keys(digest.shard).api_keys, digest.id)
        if entry is None:
            return None
        account, stored_hex, *source = entry.decode().split("|")
        if not digest.matches(stored_hex):
            return None
        return Identity(account, digest.id, "chat" if source == ["chat"] else "api")


def _mark_of(secret: str) -> bytes:
    """What a secret is remembered by, in this process alone: each request asks, and BLAKE2s takes half the work of the
    SHA-256 that the store knows."""
    return blake2s(secret.encode("utf-8", "surrogateescape")).digest()
