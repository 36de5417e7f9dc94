"""Names of the store's keys.

Every account belongs to one of 256 shards, fixed for ever by its name. The shard stands in the hash tag, so
that an account, its reservations, leases and ledger share one cluster slot.
"""

import binascii
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

#: Version of the state's layout; a different layout gets a different prefix.
PREFIX = "qg1"
SHARDS = 256
META = f"{PREFIX}:meta"
_KEY_START = f"{PREFIX}:"


class ShardKeys(NamedTuple):
    """The keys that one shard's accounts share."""

    records: str
    due: str
    ledger: str
    api_keys: str


@lru_cache(maxsize=SHARDS)
def shard_keys(shard: int) -> ShardKeys:
    """The shared keys of a shard, 0 ≤ shard < 256."""
    tag = f"{PREFIX}:{{{shard:02x}}}"
    return ShardKeys(f"{tag}:records", f"{tag}:due", f"{tag}:ledger", f"{tag}:keys")


def shard_of(account: str) -> int:
    """The shard of an account: CRC-32 of its name, frozen at installation."""
    return zlib.crc32(account.encode()) % SHARDS


@lru_cache(maxsize=10_000)
def account_key(account: str) -> str:
    """The key of the account's hash."""
    return f"{PREFIX}:{{{shard_of(account):02x}}}:account:{account}"


#: Hash slots of a cluster.
SLOTS = 16_384


def slot_of(key: str) -> int:
    """The cluster slot of a key: CRC-16 of what stands in its first braces, or of the whole key."""
    start = key.find("{") + 1
    end = key.find("}", start) if start else -1
    return binascii.crc_hqx((key[start:end] if end > start else key).encode(), 0) % SLOTS


def key_in(command: Sequence[str | bytes | int]) -> str | None:
    """The key that a command concerns: its first word with the prefix of our keys. None for a command without."""
    return next((word for word in command if isinstance(word, str) and word.startswith(_KEY_START)), None)


ACCOUNT_PATTERN = f"{PREFIX}:{{*}}:account:*"


@lru_cache(maxsize=10_000)
def money_keys(account: str) -> tuple[str, str, str, str]:
    """The keys that scripts which move credits touch: account, records, due, ledger."""
    shard = shard_keys(shard_of(account))
    return account_key(account), shard.records, shard.due, shard.ledger


def reservation_id(account: str, request: str) -> str:
    """The id of the reservation that a request (24 hex digits) makes: its shard can be read off it."""
    return _reservation_prefix(account) + request


@lru_cache(maxsize=10_000)
def _reservation_prefix(account: str) -> str:
    return f"rsv_{shard_of(account):02x}"


def shard_of_reservation(reservation: str) -> int | None:
    """The shard in a reservation's id, or None where the text is no such id."""
    digits = reservation[4:6]
    if not reservation.startswith("rsv_") or len(digits) != 2 or not set(digits) <= set("0123456789abcdef"):
        return None
    return int(digits, 16)
