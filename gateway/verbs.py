"""The operator's verbs: each takes the use cases and the parsed arguments, and answers.

Accounts, keys, credits and reservations are looked after here; ``gateway/cli.py`` says which arguments there are. The
verbs that read the ledger write as they read, because it may be far larger than what memory holds.
"""

import asyncio
import json
import secrets
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from typing import TextIO

from gateway.credits.archive import Period
from gateway.credits.auditor import Auditor
from gateway.credits.errors import EngineError, Rejected, UnknownReservation
from gateway.credits.keyspace import reservation_id
from gateway.credits.ledger import Entry
from gateway.credits.operator import Operator, Stranded
from gateway.domain.decision import Funds
from gateway.domain.money import format_credits
from gateway.output import (
    Answer,
    accounts_answer,
    audit_answer,
    entries_answer,
    entry_document,
    entry_line,
    export_writer,
    funds_document,
    funds_lines,
    keys_answer,
    pairs,
    reservations_answer,
)

#: Accounts whose credits are asked for at the same moment: far below what one connection takes.
_LIST_AT_ONCE = 1000


async def _accounts_create(operator: Operator, args: Namespace) -> Answer:
    return _funds_answer(args.account, await operator.create_account(args.account, args.plan))


async def _accounts_show(operator: Operator, args: Namespace) -> Answer:
    funds = await operator.standing(args.account)
    count = len(await operator.keys(args.account))
    return Answer(
        {**funds_document(args.account, funds), "keys": count},
        pairs({**funds_lines(args.account, funds), "keys": str(count)}),
    )


async def _accounts_list(operator: Operator, _: Namespace) -> Answer:
    names = await operator.accounts()
    standings: list[Funds | Stranded] = []
    for start in range(0, len(names), _LIST_AT_ONCE):
        standings += await asyncio.gather(*map(operator.standing, names[start : start + _LIST_AT_ONCE]))
    return accounts_answer(list(zip(names, standings, strict=True)))


async def _accounts_set_plan(operator: Operator, args: Namespace) -> Answer:
    funds = await operator.set_plan(args.account, args.plan, args.operation_id, args.version)
    return _funds_answer(args.account, funds)


async def _credits_show(operator: Operator, args: Namespace) -> Answer:
    return _funds_answer(args.account, await operator.standing(args.account))


def _funds_answer(account: str, funds: Funds | Stranded) -> Answer:
    return Answer(funds_document(account, funds), pairs(funds_lines(account, funds)))


async def _credits_add(operator: Operator, args: Namespace) -> Answer:
    operation = args.operation_id or f"cli_{secrets.token_hex(12)}"
    nano, repeated = await operator.credit(args.account, args.amount, args.kind, operation, args.reason)
    balance = format_credits(nano)
    amount = f"{format_credits(args.amount)} ({'done before, nothing moved now' if repeated else args.kind})"
    return Answer(
        {"account": args.account, "balance": balance, "operation_id": operation, "repeated": repeated},
        pairs({"account": args.account, "amount": amount, "balance": balance, "operation id": operation}),
    )


async def _credits_refund(operator: Operator, args: Namespace) -> Answer:
    """An amount to the balance, or the whole charge of a request to where it came from."""
    if args.request is None:
        return await _credits_add(operator, args)
    operation = args.operation_id or f"cli_{secrets.token_hex(12)}"
    request = args.request
    if request.startswith("req_"):  # what x-request-id says
        request = reservation_id(args.account, request.removeprefix("req_"))
    try:
        refunded = await operator.refund_request(args.account, request, operation, args.reason)
    except UnknownReservation as error:
        raise EngineError(
            f"there is no request {args.request!r} that account {args.account!r} was charged for in the last 24 h; "
            "its id is in the answer's x-request-id, or in `ledger tail`"
        ) from error
    except Rejected as error:
        # Whoever typed one form of the id need not know the other.
        raise Rejected(str(error).replace(request, args.request)) from error
    figures = {
        "allowance": format_credits(refunded.from_allowance_nano),
        "balance": format_credits(refunded.from_balance_nano),
        "written_off": format_credits(refunded.written_off_nano),
    }
    identity = {"account": args.account, "request": args.request, "operation_id": operation}
    done = "done before, nothing moved now" if refunded.repeated else "refunded"
    return Answer(
        {**identity, **figures, "repeated": refunded.repeated},
        pairs({**identity, **{name.replace("_", " "): text for name, text in figures.items()}, "state": done}),
    )


async def _keys_create(operator: Operator, args: Namespace) -> Answer:
    key, secret = await operator.create_key(args.account, args.name or "", args.secret, args.source)
    document = {"id": key.id, "account": args.account, "name": key.name, "source": key.source, "secret": None}
    lines = {"id": key.id, "account": args.account, "name": key.name or "-", "source": key.source}
    if args.secret is None:  # whoever imports a secret knows it
        document["secret"] = secret
        lines["secret"] = f"{secret}   (shown only once)"
    return Answer(document, pairs(lines))


async def _keys_list(operator: Operator, args: Namespace) -> Answer:
    return keys_answer(await operator.keys(args.account))


async def _keys_revoke(operator: Operator, args: Namespace) -> Answer:
    account = await operator.revoke_key(args.id)
    return Answer({"id": args.id, "account": account}, f"revoked {args.id} of account {account}")


async def _reservations_list(operator: Operator, args: Namespace) -> Answer:
    if args.account is not None:
        await operator.keys(args.account)  # raises UnknownAccount: a misspelt name must not look like an idle account
    return reservations_answer(await operator.reservations(args.account))


async def _reservations_void(operator: Operator, args: Namespace) -> Answer:
    ended = await operator.void_reservation(args.id)
    text = f"{args.id} had ended before ({ended.state})" if ended.repeated else f"voided {args.id}; its hold is free"
    return Answer({"id": args.id, "state": ended.state, "repeated": ended.repeated}, text)


#: Those that decide by plans. The others need of the configuration only where store and archive are: a key can be
#: revoked whatever else is wrong.
NEED_PLANS = frozenset({"accounts create", "accounts show", "accounts list", "accounts set-plan", "credits show"})
#: Those that have something to do on an empty store, and so may make one.
MAKE_STORES = frozenset({"accounts create"})

#: By the words that are typed.
VERBS: Mapping[str, Callable[[Operator, Namespace], Awaitable[Answer]]] = {
    "accounts create": _accounts_create,
    "accounts show": _accounts_show,
    "accounts list": _accounts_list,
    "accounts set-plan": _accounts_set_plan,
    "credits grant": _credits_add,
    "credits refund": _credits_refund,
    "credits deduct": _credits_add,
    "credits show": _credits_show,
    "keys create": _keys_create,
    "keys list": _keys_list,
    "keys revoke": _keys_revoke,
    "reservations list": _reservations_list,
    "reservations void": _reservations_void,
}


# --- the ledger -------------------------------------------------------------------------------------------------


async def _ledger_tail(auditor: Auditor, args: Namespace, output: TextIO) -> bool:
    entries = await auditor.tail(args.account, args.lines)
    if not args.follow:
        print(entries_answer(entries).rendered(as_json=args.json), file=output)
        return True
    after = entries[-1].sequence if entries else await auditor.last_sequence(args.account)
    for entry in entries:
        _print_entry(entry, args, output)
    async for entry in auditor.follow(args.account, after):
        _print_entry(entry, args, output)
    return True


def _print_entry(entry: Entry, args: Namespace, output: TextIO) -> None:
    print(json.dumps(entry_document(entry)) if args.json else entry_line(entry), file=output, flush=True)


async def _ledger_export(auditor: Auditor, args: Namespace, output: TextIO) -> bool:
    given = {"since_ms": args.since, "until_ms": args.until}
    period = Period(**{name: moment for name, moment in given.items() if moment is not None})
    write = export_writer(output, args.format)
    async for entry in auditor.export(args.account, period):
        write(entry)
    return True


async def _ledger_verify(auditor: Auditor, args: Namespace, output: TextIO) -> bool:
    answer = audit_answer(await auditor.verify(args.account))
    print(answer.rendered(as_json=args.json), file=output)
    return answer.ok


#: By the words that are typed. Each writes to a file, and says whether all is well.
LEDGER_VERBS: Mapping[str, Callable[[Auditor, Namespace, TextIO], Awaitable[bool]]] = {
    "ledger tail": _ledger_tail,
    "ledger export": _ledger_export,
    "ledger verify": _ledger_verify,
}
