"""The invariants of the credit engine, checked on what a store holds: account hash, records and ledger.

``check_invariants`` asks nobody what should be there; ``stored`` says what the model expects there.
"""

from collections import Counter
from typing import Any

from tests.engine_model import Account, EngineModel

_TOTALS = ("used", "bought", "refunded", "deducted", "spent", "written_off")
_NUMBERS = ("plan_version", "balance", "balance_held", "day_used", "epoch", "sequence", "seen")
_WINDOW = ("refresh", "finish", "granted", "used", "held", "before", "epoch", "first", "adopted")
_WINDOW_FIELDS = ("w1", "w2", "w3", "w4")


class Fold:
    """The ledger of one account, added up from its entries alone."""

    def __init__(self) -> None:
        self.sequence = 0
        self.plan = ""
        self.used_after = ""
        self.books: Counter[str] = Counter()

    def add(self, entry: dict[str, str]) -> None:
        assert int(entry["sequence"]) == self.sequence + 1, "the sequence has a gap"
        self.sequence += 1
        postings = read_postings(entry["postings"])
        assert sum(postings.values()) == 0
        self.books.update(postings)
        self.plan = entry.get("plan", self.plan)
        self.used_after = entry["used_after"]
        assert int(entry["balance_after"]) == self.books["balance"]


def check_invariants(values: dict[str, str], records: list[dict[str, Any]], lowered: bool, fold: Fold) -> None:
    """Invariants 1 to 6 of the engine, on the account hash, the records and the ledger as the store holds them."""
    total = {name: int(values[f"total_{name}"]) for name in _TOTALS}
    balance, balance_held = int(values["balance"]), int(values["balance_held"])
    windows = [read_window(values[name]) for name in _WINDOW_FIELDS if name in values]
    holding = [record for record in records if record["state"] == "open"]
    parts = [part for record in holding for part in record["parts"]]

    assert 0 <= balance_held <= balance
    assert balance == total["bought"] + total["refunded"] - total["spent"] - total["deducted"]
    assert balance_held == sum(record["from_balance"] for record in holding)
    for window in windows:
        _check_window(window, parts, lowered, fold)

    assert (fold.sequence, fold.plan) == (int(values["sequence"]), values["plan"])
    assert fold.books["balance"] == balance
    assert fold.books["spent"] == total["spent"]
    assert fold.books["written_off"] == total["written_off"] == -fold.books["unpaid"]
    for name in ("bought", "refunded"):
        assert fold.books[name] == -total[name]
    assert fold.books["deducted"] == total["deducted"]
    current = {str(window["refresh"]) for window in windows}
    for book, nano in fold.books.items():
        kind, _, length = book.partition(":")
        assert kind not in {"window", "before"} or length in current or nano == 0, book
    # A configuration may name the same windows in another order.
    assert sorted(fold.used_after.split()) == sorted(f"{window['refresh']}:{window['used']}" for window in windows)


def _check_window(window: dict[str, Any], parts: list[dict[str, Any]], lowered: bool, fold: Fold) -> None:
    assert min(window["used"], window["held"], window["before"], window["adopted"]) >= 0
    assert window["used"] + window["held"] + window["adopted"] <= window["granted"] or lowered
    mine = [part for part in parts if window["epoch"] in part["epochs"]]
    adopted = [part for part in parts if part not in mine and not part["epochs"].isdisjoint(window["adopted_epochs"])]
    assert window["held"] == sum(part["amount"] for part in mine)
    assert window["adopted"] == sum(part["amount"] for part in adopted)
    assert fold.books[f"window:{window['refresh']}"] == window["granted"] - window["used"]
    assert fold.books[f"before:{window['refresh']}"] == window["before"]


def stored(model: EngineModel, account: Account) -> dict[str, str]:
    """The account hash as the model says it must be."""
    numbers = {
        "plan_version": account.plan_version,
        "balance": account.balance,
        "balance_held": model.balance_held(account),
        "day_used": account.used_today,
        "epoch": account.epoch,
        "sequence": account.sequence,
        "seen": account.seen_ms,
    }
    sums = {f"total_{name}": getattr(account.totals, name) for name in _TOTALS}
    windows = {}
    for name, win in zip(_WINDOW_FIELDS, account.windows, strict=False):
        held, before, adopted = (model.held_as(account, win, how) for how in ("held", "before", "adopted"))
        figures = (
            *(win.refresh_ms, win.window.end_ms, win.window.granted_nano, win.used, held, before),
            *(win.epoch, win.first, adopted, ",".join(map(str, win.adopted))),
        )
        windows[name] = "|".join(map(str, figures))
    return {name: str(value) for name, value in (numbers | sums).items()} | {
        "plan": account.plan,
        **windows,
        **{f"k:{key}": "0|" for key in account.keys},
    }


def read_account(reply: list[bytes]) -> dict[str, str]:
    """The fields of an account hash; a number that was never anything else is 0."""
    return dict.fromkeys((*_NUMBERS, *(f"total_{name}" for name in _TOTALS)), "0") | pairs(reply)


def read_window(text: str) -> dict[str, Any]:
    """One window of an account hash."""
    *figures, epochs = text.split("|")
    window: dict[str, Any] = dict(zip(_WINDOW, map(int, figures), strict=True))
    return window | {"adopted_epochs": {int(epoch) for epoch in epochs.split(",") if epoch}}


def read_postings(text: str) -> dict[str, int]:
    """A ledger entry's postings by book."""
    words = text.split()
    return {book: int(nano) for book, nano in zip(words[::2], words[1::2], strict=True)}


def pairs(flat: list[bytes]) -> dict[str, str]:
    """A flat reply of names and values."""
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def read_record(text: str) -> dict[str, Any]:
    """What the invariants need of a reservation's record."""
    state, account, parts, from_balance = text.split("|")[:4]
    return {
        "state": state,
        "account": account,
        "parts": [_read_part(part) for part in parts.split(";") if part],
        "from_balance": int(from_balance),
    }


def _read_part(text: str) -> dict[str, Any]:
    amount, _, spans = text.partition("@")
    return {"amount": int(amount), "epochs": {int(span.split(":")[1]) for span in spans.split(",") if span}}
