"""A difference for people, and as a document."""

from typing import Any

from gateway.pricebook.difference import Change, Difference, ModelDifference
from gateway.pricebook.offer import name_of

_UNITS = {"usd_per_million_tokens": "USD per million tokens", "usd_per_token": "USD per token"}
_LONGEST_LINE = 2000


def document(difference: Difference, *, written: bool) -> dict[str, Any]:
    """The difference as JSON has it; figures as the file writes them."""
    return {
        "source": difference.source,
        "file": str(difference.book.file),
        "price_unit": difference.book.unit,
        "written": written,
        "changed": [_model(model) for model in difference.changed],
        "unchanged": [_model(model) for model in difference.unchanged],
        "not_in_source": difference.unknown,
        "refused": [{"model": name, "reason": reason} for name, reason in difference.refused.items()],
        "others_in_source": difference.others,
    }


def _model(model: ModelDifference) -> dict[str, Any]:
    return {
        "model": model.name,
        "added_to": model.upstream,
        "changes": [{"field": name_of(change.place), "old": change.old, "new": change.new} for change in model.changes],
        "kept": [{"field": name_of(kept.place), "value": kept.text, "reason": kept.reason} for kept in model.kept],
        "not_imported": list(model.notes),
    }


def text(difference: Difference) -> str:
    """The difference, model by model."""
    lines = [
        f"source  {difference.source}",
        f"file    {difference.book.file}, prices of tokens and characters in {_UNITS[difference.book.unit]}",
    ]
    for model in difference.changed:
        lines += ["", f"{model.name}: new, from {model.upstream}" if model.upstream else model.name]
        lines += _changes(model.changes) + _remarks(model)
    for model in difference.unchanged:
        if model.kept or model.notes:
            lines += ["", f"{model.name}: unchanged", *_remarks(model)]
    quiet = sum(not (model.kept or model.notes) for model in difference.unchanged)
    ends = [
        f"unchanged: {quiet} more" if quiet else "",
        f"not in the source, left as they are: {', '.join(difference.unknown)}" if difference.unknown else "",
        *(f"REFUSED, left as it is: {name}: {reason}" for name, reason in difference.refused.items()),
        f"in the source only: {difference.others} (--add takes them over)" if difference.others else "",
        "" if difference.changed else "nothing to change",
    ]
    return "\n".join(map(_printable, [*lines, "", *(end for end in ends if end)])).rstrip("\n")


def _printable(line: str) -> str:
    """A line fit for a terminal, whatever the source calls its models and fields."""
    short = line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"
    return "".join(character if character.isprintable() else "?" for character in short)


def _changes(changes: tuple[Change, ...]) -> list[str]:
    rows = [(name_of(change.place), change.old or "-", change.new or "-") for change in changes]
    names, olds = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [f"  {name.ljust(names)}  {old.rjust(olds)} -> {new}" for name, old, new in rows]


def _remarks(model: ModelDifference) -> list[str]:
    return [
        *(f"  kept: {name_of(kept.place)} {kept.text}: {kept.reason}" for kept in model.kept),
        *(f"  not imported: {note}" for note in model.notes),
    ]
