"""What the operator's verbs answer: a document for programs (``--json``) and the same as text for people."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from gateway.credits.auditor import Audit
from gateway.credits.ledger import Entry
from gateway.credits.operator import ApiKey, OpenReservation, Stranded
from gateway.doctor import Finding
from gateway.domain.decision import Funds, WindowFunds
from gateway.domain.money import format_credits
from gateway.http.errors import duration, rfc3339

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


def funds_document(account: str, funds: Funds | Stranded) -> dict[str, Any]:
    """An account's credits, amounts as decimal strings. allowance: the window that decides, and in windows all of
    them. window, resets_at: None on a plan without an allowance. On a plan that is not in the configuration, allowance
    is None, and error says what to do."""
    if isinstance(funds, Stranded):
        return {
            "account": account,
            "plan": funds.plan,
            "allowance": None,
            "windows": [],
            **_balance_document(funds),
            "error": _what_to_do(funds),
        }
    tightest = funds.tightest
    return {
        "account": account,
        "plan": funds.plan,
        "allowance": {
            **_window_document(tightest),
            "window": funds.now_ms // tightest.refresh_ms if funds.windows else None,
            "resets_at": _time_or_none(funds.resets_at_ms),
        },
        "windows": [
            {
                "refresh": duration(window.refresh_ms),
                **_window_document(window),
                "resets_at": rfc3339(window.resets_at_ms),
            }
            for window in funds.windows
        ],
        **_balance_document(funds),
    }


def _balance_document(funds: Funds | Stranded) -> dict[str, str]:
    return {"balance": format_credits(funds.balance_nano), "balance_held": format_credits(funds.balance_held_nano)}


def _not_configured(funds: Stranded) -> str:
    return f"plan {funds.plan!r} is not in the configuration"


def _what_to_do(funds: Stranded) -> str:
    return (
        f"{_not_configured(funds)}: the account's requests are refused until the plan is back or "
        "`accounts set-plan` moves the account to another"
    )


def _window_document(window: WindowFunds) -> dict[str, str]:
    return {
        "granted": format_credits(window.granted_nano),
        "used": format_credits(window.used_nano),
        "held": format_credits(window.held_nano),
        "remaining": format_credits(window.remaining_nano),
    }


def funds_lines(account: str, funds: Funds | Stranded) -> dict[str, str]:
    """The same for people, as ``pairs`` takes it."""
    if isinstance(funds, Stranded):
        return {"account": account, "plan": funds.plan, "balance": _balance(funds), "note": _what_to_do(funds)}
    allowances = {"allowance": "none"}
    if len(funds.windows) == 1:
        allowances = {"allowance": _allowance(funds.windows[0], funds.now_ms)}
    elif funds.windows:
        allowances = {
            f"allowance, {duration(window.refresh_ms)}": _allowance(window, funds.now_ms) for window in funds.windows
        }
    return {"account": account, "plan": funds.plan, **allowances, "balance": _balance(funds)}


def _allowance(window: WindowFunds, now_ms: int) -> str:
    left = f"{format_credits(window.remaining_nano)} of {format_credits(window.granted_nano)} left"
    spent = f"{format_credits(window.used_nano)} used, {format_credits(window.held_nano)} held"
    minutes = -(-max(0, window.resets_at_ms - now_ms) // 60_000)
    return f"{left} ({spent}); resets {rfc3339(window.resets_at_ms)}, in {minutes // 60} h {minutes % 60} min"


def _balance(funds: Funds | Stranded) -> str:
    held = f" ({format_credits(funds.balance_held_nano)} held)" if funds.balance_held_nano else ""
    return f"{format_credits(funds.balance_nano)}{held}"


def accounts_answer(entries: Sequence[tuple[str, Funds | Stranded]]) -> Answer:
    """Every account with its funds."""
    documents, rows = [], []
    for account, funds in entries:
        documents.append(funds_document(account, funds))
        if isinstance(funds, Stranded):
            rows.append((account, funds.plan, "?", f"{_balance(funds)} ({_not_configured(funds)})"))
            continue
        left = "none" if funds.resets_at_ms is None else format_credits(funds.allowance_remaining_nano)
        rows.append((account, funds.plan, left, _balance(funds)))
    text = table(("account", "plan", "allowance left", "balance"), rows) if rows else "no accounts"
    return Answer({"data": documents}, text)


def keys_answer(keys: Sequence[ApiKey]) -> Answer:
    """An account's keys."""
    documents = [
        {"id": key.id, "name": key.name, "source": key.source, "created_at": rfc3339(key.created_at_ms)} for key in keys
    ]
    rows = [(key.id, key.name or "-", key.source, rfc3339(key.created_at_ms)) for key in keys]
    return Answer({"data": documents}, table(("id", "name", "source", "created"), rows) if rows else "no keys")


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


def findings_answer(findings: Sequence[Finding]) -> Answer:
    """What the doctor found; not ok if anything fails."""
    documents = [{"component": one.component, "ok": one.ok, "detail": one.detail} for one in findings]
    rows = [(one.state, one.component, one.detail) for one in findings]
    text = table(("state", "component", "detail"), rows)
    return Answer({"data": documents}, text, all(one.ok for one in findings))


def _time_or_none(epoch_ms: int | None) -> str | None:
    return None if epoch_ms is None else rfc3339(epoch_ms)


# --- the ledger -------------------------------------------------------------------------------------------------


def entry_document(entry: Entry) -> dict[str, Any]:
    """One entry, amounts as decimal strings; what its kind does not have is None or empty. Lengths of windows, in the
    names of books too, are in milliseconds."""
    return {
        "account": entry.account,
        "sequence": entry.sequence,
        "time": rfc3339(entry.time_ms),
        "time_ms": entry.time_ms,
        "kind": entry.kind,
        "id": entry.id,
        "postings": {book: format_credits(nano) for book, nano in entry.postings.items()},
        "used_after": {str(refresh_ms): format_credits(nano) for refresh_ms, nano in entry.used_after.items()},
        "balance_after": format_credits(entry.balance_after_nano),
        "plan": entry.plan or None,
        "model": entry.model or None,
        "key": f"key_{entry.key}" if entry.key else None,
        "price_version": entry.price_version or None,
        "source": entry.source or None,
        "tokens": dict(entry.tokens),
        "reason": entry.reason or None,
        "stream": f"{entry.shard:02x}",
        "stream_id": entry.stream_id,
        "extra": dict(entry.extra),
    }


_ENTRY_HEADER = ("entry", "time", "kind", "id", "movement", "balance", "what")


def _entry_cells(entry: Entry) -> tuple[str, ...]:
    movement = ", ".join(f"{_book(book)} {_signed(nano)}" for book, nano in entry.postings.items())
    tokens = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in entry.tokens.items())
    what = "; ".join(text for text in (entry.plan, entry.model, tokens, entry.reason) if text)
    return (
        str(entry.sequence),
        rfc3339(entry.time_ms),
        entry.kind,
        entry.id,
        movement or "-",
        format_credits(entry.balance_after_nano),
        what,
    )


def _book(book: str) -> str:
    name, _, refresh = book.partition(":")
    return f"{name}:{duration(int(refresh))}" if refresh.isdecimal() else book


def _signed(nano: int) -> str:
    return f"{'+' if nano > 0 else ''}{format_credits(nano)}"


def entry_line(entry: Entry) -> str:
    """One entry for people, in a line of its own."""
    return _GAP.join(_entry_cells(entry)).rstrip()


def entries_answer(entries: Sequence[Entry]) -> Answer:
    """Entries of the ledger, in this order."""
    rows = [_entry_cells(entry) for entry in entries]
    return Answer(
        {"data": [entry_document(entry) for entry in entries]}, table(_ENTRY_HEADER, rows) if rows else "no entries"
    )


def export_writer(output: TextIO, form: Literal["jsonl", "csv"]) -> Callable[[Entry], object]:
    """What writes one entry to output: a JSON document per line, or a row of CSV, below a header that is written at
    once, whose mappings are JSON."""
    if form == "jsonl":
        return lambda entry: output.write(json.dumps(entry_document(entry)) + "\n")
    writer = csv.writer(output)
    writer.writerow(_EXPORT_COLUMNS)

    def write(entry: Entry) -> None:
        document = entry_document(entry)
        cells = (document[column] for column in _EXPORT_COLUMNS)
        writer.writerow("" if cell is None else json.dumps(cell) if isinstance(cell, dict) else cell for cell in cells)

    return write


_EXPORT_COLUMNS = (
    *("account", "sequence", "time", "time_ms", "kind", "id", "postings", "used_after", "balance_after", "plan"),
    *("model", "key", "price_version", "source", "tokens", "reason", "stream", "stream_id", "extra"),
)


def audit_answer(audit: Audit) -> Answer:
    """What ``ledger verify`` found; not ok if anything does not agree."""
    ok = not audit.mismatches
    lines = [str(one) for one in audit.mismatches]
    lines += [f"account {name}: {what}; kept in the archive's table ledger_conflicts" for name, what in audit.lost]
    lines += [f"account {name}: its holds were not checked: it changes too fast" for name in audit.unchecked]
    counted = f"{audit.entries} entries of {audit.accounts} accounts"
    lines.append(f"ok: {counted} agree" if ok else f"{len(audit.mismatches)} mismatches in {counted}")
    mismatches = [
        {"account": one.account, "what": one.what, "expected": one.expected, "found": one.found}
        for one in audit.mismatches
    ]
    return Answer(
        {
            "ok": ok,
            "accounts": audit.accounts,
            "entries": audit.entries,
            "mismatches": mismatches,
            "unchecked": audit.unchecked,
            "lost": [{"account": name, "what": what} for name, what in audit.lost],
        },
        "\n".join(lines),
        ok,
    )
