"""The invariants of the credit engine, checked on what a store holds: account hash, records and ledger.

``check_invariants`` asks nobody what should be there; ``stored`` says what the model expects there.
"""

from typing import Any

from tests.engine_model import Account, EngineModel

_TOTALS = ("granted", "used", "lapsed", "bought", "refunded", "spent", "written_off")


class Fold:
    """The ledger of one account, added up from its entries alone."""

    def __init__(self) -> None:
        self.sequence = 0
        self.used = 0
        self.granted = 0
        self.plan = ""
        self.sums = dict.fromkeys(("granted", "lapsed", "allowance", "balance", "written_off"), 0)

    def add(self, entry: dict[str, str]) -> None:
        assert int(entry["sequence"]) == self.sequence + 1, "the sequence has a gap"
        self.sequence += 1
        for name in self.sums:
            self.sums[name] += int(entry.get(name, "0"))
        used, granted = int(entry["used_after"]), int(entry.get("granted", "0"))
        if entry["kind"] == "refresh":
            self.granted = granted + used
        elif entry["kind"] == "plan":
            self.granted += granted + used - self.used
        elif entry["kind"] == "settle":
            assert 0 <= used - self.used <= int(entry.get("allowance", "0"))
        else:
            assert used == self.used
        self.used = used
        self.plan = entry.get("plan", self.plan)
        assert int(entry["balance_after"]) == self.sums["balance"]


def check_invariants(values: dict[str, str], records: list[dict[str, Any]], lowered: bool, fold: Fold) -> None:
    """Invariants 1 to 6 of the engine, on the account hash, the records and the ledger as the store holds them."""
    number = {name: int(value) for name, value in values.items() if name != "plan" and not name.startswith("k:")}
    total = {name: number.get(f"total_{name}", 0) for name in _TOTALS}
    granted, used, held, before = (number[name] for name in ("granted", "used", "held", "held_before"))
    balance, balance_held = number["balance"], number["balance_held"]
    holding = [record for record in records if record["state"] == "open"]
    current = [record["from_allowance"] for record in holding if record["epoch"] == number["epoch"]]
    earlier = [record["from_allowance"] for record in holding if record["epoch"] < number["epoch"]]

    assert min(used, held, before, balance_held) >= 0
    assert balance_held <= balance
    assert used + held <= granted or lowered
    assert balance == total["bought"] + total["refunded"] - total["spent"]
    assert held == sum(current)
    assert before == sum(earlier)
    assert balance_held == sum(record["from_balance"] for record in holding)
    assert total["granted"] == total["used"] + total["lapsed"] + (granted - used - held) + held + before
    assert (fold.sequence, fold.plan) == (number["sequence"], values["plan"])
    assert (fold.used, fold.granted, fold.sums["balance"]) == (used, granted, balance)
    assert (fold.sums["granted"], fold.sums["allowance"]) == (total["granted"], total["used"])
    assert (fold.sums["lapsed"], fold.sums["written_off"]) == (total["lapsed"], total["written_off"])


def stored(model: EngineModel, account: Account) -> dict[str, str]:
    """The account hash as the model says it must be."""
    window = account.window
    numbers = {
        "plan_version": account.plan_version,
        "refresh": window.end_ms - window.start_ms,
        "window_end": window.end_ms,
        "granted": window.granted_nano,
        "used": account.used,
        "used_today": account.used_earlier,
        "held": model.held(account),
        "held_before": model.held_before(account),
        "balance": account.balance,
        "balance_held": model.balance_held(account),
        "epoch": account.epoch,
        "sequence": account.sequence,
        "seen": account.seen_ms,
    }
    sums = {f"total_{name}": getattr(account.totals, name) for name in _TOTALS}
    return {name: str(value) for name, value in (numbers | sums).items()} | {
        "plan": account.plan,
        **{f"k:{key}": "0|" for key in account.keys},
    }


def read_account(reply: list[bytes]) -> dict[str, str]:
    """The fields of an account hash; a total that nothing was ever added to is 0."""
    return dict.fromkeys((f"total_{name}" for name in _TOTALS), "0") | pairs(reply)


def pairs(flat: list[bytes]) -> dict[str, str]:
    """A flat reply of names and values."""
    texts = [text.decode() for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def read_record(text: str) -> dict[str, Any]:
    """What the invariants need of a reservation's record."""
    parts = text.split("|")
    if parts[0] in {"settled", "voided"}:
        return {"state": parts[0], "account": parts[1]}
    return {
        "state": parts[0],
        "account": parts[1],
        "epoch": int(parts[2]),
        "from_allowance": int(parts[3]),
        "from_balance": int(parts[4]),
    }
