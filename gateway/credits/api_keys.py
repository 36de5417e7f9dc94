"""Secrets that customers send, and the ids that stand for them everywhere else.

Only the SHA-256 of a secret is stored. The first 24 hex digits of it are the key's id; the first two name the
shard of the index that leads from a secret to its account.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

_SECRET = re.compile(r"[!-~]{16,256}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,31}")


@dataclass(frozen=True, slots=True)
class KeyDigest:
    """What the store knows of a secret."""

    hex: str

    @property
    def id(self) -> str:
        """The key's public id, without its ``key_`` prefix."""
        return self.hex[:24]

    @property
    def shard(self) -> int:
        """The shard of the index that holds it."""
        return int(self.hex[:2], 16)

    def matches(self, stored_hex: str) -> bool:
        """Whether a stored digest is this one, in constant time."""
        return hmac.compare_digest(self.hex, stored_hex)


def digest_of(secret: str) -> KeyDigest:
    """The digest of a secret as a client sends it, whatever bytes it may be."""
    return KeyDigest(hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest())


def new_secret() -> str:
    """A fresh secret with 256 bits of chance."""
    return f"sk-qg-{secrets.token_urlsafe(32)}"


def check_secret(secret: str) -> str:
    """The secret of an operator's choosing. Raises ValueError unless it is 16…256 visible ASCII characters."""
    if not _SECRET.fullmatch(secret):
        raise ValueError("a secret is 16 to 256 visible ASCII characters, without spaces")
    return secret


def check_key_name(name: str) -> str:
    """Raises ValueError unless the name is 1…32 letters, digits, spaces or ``._@-``."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a key name: 1 to 32 letters, digits, spaces or . _ @ -")
    return name
