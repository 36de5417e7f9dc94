"""The operator's verbs: each takes the use cases, the configured plans and the parsed arguments, and answers.

Accounts, keys, credits and reservations are looked after here; ``gateway/cli.py`` says which arguments there are.
"""

import asyncio
import secrets
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping

from gateway.credits.errors import UnknownPlan
from gateway.credits.operator import Operator
from gateway.domain.decision import Funds
from gateway.domain.money import format_credits
from gateway.domain.plan import Plan
from gateway.output import (
    Answer,
    accounts_answer,
    funds_document,
    funds_lines,
    keys_answer,
    pairs,
    reservations_answer,
)

#: Accounts whose credits are asked for at the same moment: far below what one connection takes.
_LIST_AT_ONCE = 1000

Plans = Mapping[str, Plan]


async def _accounts_create(operator: Operator, plans: Plans, args: Namespace) -> Answer:
    return _funds_answer(args.account, await operator.create_account(args.account, args.plan), plans)


async def _accounts_show(operator: Operator, plans: Plans, args: Namespace) -> Answer:
    funds = await operator.funds(args.account)
    count = len(await operator.keys(args.account))
    return Answer(
        {**funds_document(args.account, funds, plans), "keys": count},
        pairs({**funds_lines(args.account, funds), "keys": str(count)}),
    )


async def _accounts_list(operator: Operator, plans: Plans, _: Namespace) -> Answer:
    async def entry(account: str) -> tuple[str, Funds | str]:
        try:
            return account, await operator.funds(account)
        except UnknownPlan as error:  # the list is how the operator finds out which accounts these are
            return account, str(error)

    names = await operator.accounts()
    entries = []
    for start in range(0, len(names), _LIST_AT_ONCE):
        entries += await asyncio.gather(*map(entry, names[start : start + _LIST_AT_ONCE]))
    return accounts_answer(entries, plans)


async def _accounts_set_plan(operator: Operator, plans: Plans, args: Namespace) -> Answer:
    funds = await operator.set_plan(args.account, args.plan, args.operation_id, args.version)
    return _funds_answer(args.account, funds, plans)


async def _credits_show(operator: Operator, plans: Plans, args: Namespace) -> Answer:
    return _funds_answer(args.account, await operator.funds(args.account), plans)


def _funds_answer(account: str, funds: Funds, plans: Plans) -> Answer:
    return Answer(funds_document(account, funds, plans), pairs(funds_lines(account, funds)))


async def _credits_add(operator: Operator, _: Plans, args: Namespace) -> Answer:
    operation = args.operation_id or f"cli_{secrets.token_hex(12)}"
    nano, repeated = await operator.credit(args.account, args.amount, args.kind, operation, args.reason)
    balance = format_credits(nano)
    amount = f"{format_credits(args.amount)} ({'done before, nothing added now' if repeated else args.kind})"
    return Answer(
        {"account": args.account, "balance": balance, "operation_id": operation, "repeated": repeated},
        pairs({"account": args.account, "amount": amount, "balance": balance, "operation id": operation}),
    )


async def _keys_create(operator: Operator, _: Plans, args: Namespace) -> Answer:
    key, secret = await operator.create_key(args.account, args.name or "", args.secret)
    document = {"id": key.id, "account": args.account, "name": key.name, "secret": None}
    lines = {"id": key.id, "account": args.account, "name": key.name or "-"}
    if args.secret is None:  # whoever imports a secret knows it
        document["secret"] = secret
        lines["secret"] = f"{secret}   (shown only once)"
    return Answer(document, pairs(lines))


async def _keys_list(operator: Operator, _: Plans, args: Namespace) -> Answer:
    return keys_answer(await operator.keys(args.account))


async def _keys_revoke(operator: Operator, _: Plans, args: Namespace) -> Answer:
    account = await operator.revoke_key(args.id)
    return Answer({"id": args.id, "account": account}, f"revoked {args.id} of account {account}")


async def _reservations_list(operator: Operator, _: Plans, args: Namespace) -> Answer:
    if args.account is not None:
        await operator.keys(args.account)  # raises UnknownAccount: a misspelt name must not look like an idle account
    return reservations_answer(await operator.reservations(args.account))


async def _reservations_void(operator: Operator, _: Plans, args: Namespace) -> Answer:
    ended = await operator.void_reservation(args.id)
    text = f"{args.id} had ended before ({ended.state})" if ended.repeated else f"voided {args.id}; its hold is free"
    return Answer({"id": args.id, "state": ended.state, "repeated": ended.repeated}, text)


#: By the words that are typed.
VERBS: Mapping[str, Callable[[Operator, Plans, Namespace], Awaitable[Answer]]] = {
    "accounts create": _accounts_create,
    "accounts show": _accounts_show,
    "accounts list": _accounts_list,
    "accounts set-plan": _accounts_set_plan,
    "credits grant": _credits_add,
    "credits refund": _credits_add,
    "credits show": _credits_show,
    "keys create": _keys_create,
    "keys list": _keys_list,
    "keys revoke": _keys_revoke,
    "reservations list": _reservations_list,
    "reservations void": _reservations_void,
}
