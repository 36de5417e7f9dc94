"""What the operator's verbs answer: a document for programs (``--json``) and the same as text for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.credits.operator import ApiKey, OpenReservation
from gateway.domain.decision import Funds
from gateway.domain.money import format_credits
from gateway.domain.plan import Plan
from gateway.domain.window import window_at
from gateway.http.errors import rfc3339

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb prints. ok: False makes the command end with exit code 1, although it did its work."""

    document: Mapping[str, Any]
    text: str
    ok: bool = True

    def rendered(self, *, as_json: bool) -> str:
        """The one or the other, without a final newline."""
        return json.dumps(self.document, indent=2) if as_json else self.text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the header in capitals."""
    lines = [[name.upper() for name in header], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        _GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(values: Mapping[str, str]) -> str:
    """One ``name  value`` line each, the values aligned."""
    width = max(len(name) for name in values)
    return "\n".join(f"{name.ljust(width)}{_GAP}{value}".rstrip() for name, value in values.items())


def funds_document(account: str, funds: Funds, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """An account's credits, amounts as decimal strings. window, resets_at: None on a plan without an allowance."""
    allowance = plans[funds.plan].allowance
    return {
        "account": account,
        "plan": funds.plan,
        "allowance": {
            "granted": format_credits(funds.granted_nano),
            "used": format_credits(funds.used_nano),
            "held": format_credits(funds.held_nano),
            "remaining": format_credits(funds.allowance_remaining_nano),
            "window": window_at(allowance, funds.now_ms).number if allowance else None,
            "resets_at": _time_or_none(funds.resets_at_ms),
        },
        "balance": format_credits(funds.balance_nano),
        "balance_held": format_credits(funds.balance_held_nano),
    }


def funds_lines(account: str, funds: Funds) -> dict[str, str]:
    """The same for people, as ``pairs`` takes it."""
    return {"account": account, "plan": funds.plan, "allowance": _allowance(funds), "balance": _balance(funds)}


def _allowance(funds: Funds) -> str:
    if funds.resets_at_ms is None:
        return "none"
    left = f"{format_credits(funds.allowance_remaining_nano)} of {format_credits(funds.granted_nano)} left"
    spent = f"{format_credits(funds.used_nano)} used, {format_credits(funds.held_nano)} held"
    minutes = -(-max(0, funds.resets_at_ms - funds.now_ms) // 60_000)
    return f"{left} ({spent}); resets {rfc3339(funds.resets_at_ms)}, in {minutes // 60} h {minutes % 60} min"


def _balance(funds: Funds) -> str:
    held = f" ({format_credits(funds.balance_held_nano)} held)" if funds.balance_held_nano else ""
    return f"{format_credits(funds.balance_nano)}{held}"


def accounts_answer(entries: Sequence[tuple[str, Funds | str]], plans: Mapping[str, Plan]) -> Answer:
    """Every account with its funds, or with the reason why they are not to be had."""
    documents, rows = [], []
    for account, funds in entries:
        if isinstance(funds, str):
            documents.append({"account": account, "error": funds})
            rows.append((account, "?", "?", f"? ({funds})"))
            continue
        documents.append(funds_document(account, funds, plans))
        left = "none" if funds.resets_at_ms is None else format_credits(funds.allowance_remaining_nano)
        rows.append((account, funds.plan, left, _balance(funds)))
    text = table(("account", "plan", "allowance left", "balance"), rows) if rows else "no accounts"
    return Answer({"data": documents}, text)


def keys_answer(keys: Sequence[ApiKey]) -> Answer:
    """An account's keys."""
    documents = [{"id": key.id, "name": key.name, "created_at": rfc3339(key.created_at_ms)} for key in keys]
    rows = [(key.id, key.name or "-", rfc3339(key.created_at_ms)) for key in keys]
    return Answer({"data": documents}, table(("id", "name", "created"), rows) if rows else "no keys")


def reservations_answer(reservations: Sequence[OpenReservation]) -> Answer:
    """The reservations that are open."""
    documents = [
        {
            "id": one.id,
            "account": one.account,
            "held": format_credits(one.held_nano),
            "lease_expires_at": rfc3339(one.lease_expires_at_ms),
            "created_at": rfc3339(one.created_at_ms),
            "model": one.model,
        }
        for one in reservations
    ]
    header = ("id", "account", "held", "lease_expires_at", "created_at", "model")
    rows = [[one[name] for name in header] for one in documents]
    titles = [name.removesuffix("_at").replace("_", " ") for name in header]
    return Answer({"data": documents}, table(titles, rows) if rows else "no open reservations")


def _time_or_none(epoch_ms: int | None) -> str | None:
    return None if epoch_ms is None else rfc3339(epoch_ms)
