"""What an operator does with accounts, keys and credits: the verbs of the command line."""

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from gateway.credits import scripts
from gateway.credits.api_keys import check_key_name, check_secret, digest_of, new_secret
from gateway.credits.errors import EngineError, Rejected, UnknownAccount, UnknownPlan, UnknownReservation
from gateway.credits.keyspace import (
    ACCOUNT_PATTERN,
    SHARDS,
    account_key,
    shard_keys,
    shard_of,
    shard_of_reservation,
)
from gateway.credits.scripts import CreditKind
from gateway.credits.service import repeat_if_lost
from gateway.credits.store import Store
from gateway.domain.decision import Funds, Settlement
from gateway.domain.names import check_account_name, check_operation_id, check_reason
from gateway.domain.plan import Plan

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What a key is for: the ledger keeps it with every charge.
KeySource = Literal["api", "chat"]


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """One line of ``reservations list``."""

    id: str
    account: str
    held_nano: int
    created_at_ms: int
    lease_expires_at_ms: int
    model: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of ``keys list``. The secret itself is nowhere."""

    id: str
    name: str
    created_at_ms: int
    source: KeySource = "api"


@dataclass(frozen=True, slots=True)
class Stranded:
    """The prepaid credits, in nano-credits, of an account whose plan is not in the configuration. Whatever it has, its
    requests are refused until it is moved to another plan."""

    plan: str
    balance_nano: int
    balance_held_nano: int


class Operator:
    """The use cases of an operator. Operations that move credits carry an id and happen once.

    All raise ValueError for an account name, operation id or reason that ``domain/names.py`` refuses.
    """

    def __init__(self, store: Store, plans: Mapping[str, Plan], default_plan: str) -> None:
        self._store = store
        self._plans = plans
        self._default_plan = default_plan

    def _plan(self, name: str) -> Plan:
        try:
            return self._plans[name]
        except KeyError:
            raise UnknownPlan(name) from None

    async def create_account(self, account: str, plan: str | None = None) -> Funds:
        """Open an account on a plan (the default one without). Raises Rejected if it exists, UnknownPlan."""
        check_account_name(account)
        return await scripts.create(self._store, account, self._plan(self._default_plan if plan is None else plan))

    async def accounts(self) -> list[str]:
        """The names of all accounts, sorted."""
        keys = await self._store.scan(ACCOUNT_PATTERN)
        return sorted(key.split(":account:", 1)[1] for key in keys)

    async def funds(self, account: str) -> Funds:
        """The account's credits as of now. Raises UnknownAccount, UnknownPlan."""
        check_account_name(account)
        plan = self._default_plan
        while isinstance(outcome := await scripts.show(self._store, account, self._plan(plan)), str):
            plan = outcome
        return outcome

    async def standing(self, account: str) -> Funds | Stranded:
        """The account's credits as of now, also where its plan is gone. Raises UnknownAccount."""
        while True:
            try:
                return await self.funds(account)
            except UnknownPlan as error:
                # Its windows cannot be told without the plan's terms; its balance can.
                found = await scripts.show(self._store, account, Plan(error.plan))
            if isinstance(found, Funds):
                return Stranded(found.plan, found.balance_nano, found.balance_held_nano)

    async def set_plan(self, account: str, plan: str, operation: str | None = None, version: int = 0) -> Funds:
        """Move the account to another plan. Raises UnknownAccount, UnknownPlan, OperationConflict, Rejected."""
        check_account_name(account)
        target = self._plan(plan)
        operation = check_operation_id(operation or _new_operation())
        return await self._durably(account, lambda: scripts.set_plan(self._store, account, operation, version, target))

    async def credit(
        self,
        account: str,
        amount_nano: int,
        kind: CreditKind,
        operation: str | None = None,
        reason: str = "",
    ) -> tuple[int, bool]:
        """Add or deduct prepaid credits; the new balance and whether this operation id had been done before.
        Raises UnknownAccount, OperationConflict, Rejected."""
        check_account_name(account)
        check_reason(reason)
        operation = check_operation_id(operation or _new_operation())
        if amount_nano < 1:
            raise Rejected("the amount must be more than 0")
        return await self._durably(
            account, lambda: scripts.credit(self._store, account, operation, kind, amount_nano, _note(reason))
        )

    async def refund_request(
        self, account: str, reservation: str, operation: str | None = None, reason: str = ""
    ) -> Settlement:
        """Give back what a request of the last 24 h was charged, to where it came from; what that was. Raises
        UnknownAccount, UnknownReservation, OperationConflict, Rejected."""
        check_account_name(account)
        check_reason(reason)
        operation = check_operation_id(operation or _new_operation())
        return await self._durably(
            account, lambda: scripts.refund(self._store, account, operation, reservation, _note(reason))
        )

    async def _durably(self, account: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Once, and on a replica too where there is one: nobody says an operation again by himself after a failover."""
        outcome = await repeat_if_lost(self._store, attempt)
        if not await self._store.replicated(account_key(account)):
            log.warning(
                "it is done, but no replica has it yet: should the primary be lost now, say it again with the same "
                "operation id"
            )
        return outcome

    async def create_key(
        self, account: str, name: str = "", secret: str | None = None, source: KeySource = "api"
    ) -> tuple[ApiKey, str]:
        """Make a key, of a new secret or of one given; the key and its secret. Raises UnknownAccount, ValueError
        for an unusable name or secret, Rejected for a secret that another key has."""
        check_account_name(account)
        secret = check_secret(secret) if secret is not None else new_secret()
        name = check_key_name(name) if name else ""
        if not await self._store.call("EXISTS", account_key(account)):
            raise UnknownAccount(account)
        digest = digest_of(secret)
        created_ms = time.time_ns() // 1_000_000
        index = shard_keys(digest.shard).api_keys
        # The account first: an index entry that leads to an account without the key is refused, never the reverse.
        if not await self._store.call(
            "HSETNX", account_key(account), f"k:{digest.id}", f"{created_ms}|{name}|{source}"
        ):
            raise Rejected(f"account {account!r} has a key with this secret already")
        if not await self._store.call("HSETNX", index, digest.id, f"{account}|{digest.hex}|{source}"):
            await self._store.call("HDEL", account_key(account), f"k:{digest.id}")
            raise Rejected("another account has a key with this secret already")
        return ApiKey(f"key_{digest.id}", name, created_ms, source), secret

    async def keys(self, account: str) -> list[ApiKey]:
        """The account's keys, oldest first. Raises UnknownAccount."""
        check_account_name(account)
        flat = [text.decode() for text in await self._store.call("HGETALL", account_key(account))]
        if not flat:
            raise UnknownAccount(account)
        found = []
        for field, value in zip(flat[::2], flat[1::2], strict=True):
            if field.startswith("k:"):
                created, name, *source = value.split("|")
                kept: KeySource = "chat" if source == ["chat"] else "api"
                found.append(ApiKey(f"key_{field[2:]}", name, int(created), kept))
        return sorted(found, key=lambda key: key.created_at_ms)

    async def revoke_key(self, key: str) -> str:
        """End a key at once, on every gateway; the account it belonged to. Raises EngineError if there is none."""
        digest = key.removeprefix("key_")
        if len(digest) != 24 or not set(digest) <= set("0123456789abcdef"):
            # What was given is not repeated: people paste secrets here.
            raise EngineError("that is not a key's id: give it as `keys list` shows it, key_ and 24 digits")
        unknown = EngineError(f"there is no key {key!r}")
        index = shard_keys(int(digest[:2], 16)).api_keys
        entry = await self._store.call("HGET", index, digest)
        if entry is None:
            raise unknown
        account: str = entry.decode().split("|")[0]
        await self._store.call("HDEL", account_key(account), f"k:{digest}")
        await self._store.call("HDEL", index, digest)
        return account

    async def reservations(self, account: str | None = None) -> list[OpenReservation]:
        """The open reservations of an account, or of all, oldest first."""
        shards = range(SHARDS) if account is None else (shard_of(check_account_name(account)),)
        found = []
        for shard in shards:
            cursor = b"0"
            while True:
                cursor, flat = await self._store.call("HSCAN", shard_keys(shard).records, cursor, "COUNT", 1000)
                pairs = zip(flat[::2], flat[1::2], strict=True)
                found += [_open_reservation(name, text) for name, text in pairs if text.startswith(b"open|")]
                if cursor == b"0":
                    break
        if account is not None:
            found = [one for one in found if one.account == account]
        return sorted({one.id: one for one in found}.values(), key=lambda one: one.created_at_ms)

    async def now_ms(self) -> int:
        """The store's clock, milliseconds since 1970."""
        seconds, micros = await self._store.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def abandon_orphans(self, before_ms: int) -> int:
        """End every reservation made before a moment of the store's clock, as if its lease had run out; how many. Only
        for a gateway that has the store to itself and started at that moment: whoever made them is gone."""
        orphans = [one for one in await self.reservations() if one.created_at_ms < before_ms]
        for one in orphans:
            await scripts.release(self._store, one.account, one.id, "abandon")
        return len(orphans)

    async def void_reservation(self, reservation: str) -> Settlement:
        """Give an open reservation's hold back; the way it ended, if it had ended. Raises UnknownReservation."""
        shard = shard_of_reservation(reservation)
        record = None if shard is None else await self._store.call("HGET", shard_keys(shard).records, reservation)
        if record is None:
            raise UnknownReservation(reservation)
        account = record.decode().split("|")[1]
        outcome = await scripts.release(self._store, account, reservation, "void")
        assert outcome is not None
        return outcome


def _open_reservation(name: bytes, text: bytes) -> OpenReservation:
    fields = text.decode().split("|")
    from_allowance = sum(int(part.partition("@")[0]) for part in fields[2].split(";") if part)
    return OpenReservation(
        id=name.decode(),
        account=fields[1],
        held_nano=from_allowance + int(fields[3]),
        created_at_ms=int(fields[8]),
        lease_expires_at_ms=int(fields[9]),
        model=fields[12],
    )


def _note(reason: str) -> str:
    return json.dumps({"reason": reason}) if reason else ""


def _new_operation() -> str:
    return f"op_{secrets.token_hex(12)}"
