"""Usage and answers of rerankers: tokens of input, or search units.

Where figures disagree: ``usage.prompt_tokens`` is believed before ``usage.total_tokens``, and a ``usage`` before
``meta.billed_units``. Search units are billed beside tokens: a model has a price for one of them.
"""

from dataclasses import replace
from typing import Any

from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.domain.value import value
from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.embeddings import read_embeddings_usage
from gateway.upstream.usage.figures import Usage, count
from gateway.upstream.usage.shown import document_of, shows_else

#: What a search unit covers where an upstream bills by them: so many documents.
UNIT_DOCUMENTS = 100

_RESULTS = ("results", "data")


@value(frozen=True, slots=True)
class Ranks(Answer):
    """A whole answer. search_units: as the upstream bills it; None where it does not."""

    search_units: int | None = None

    def metered(self, ask: Ask, bound: Bound) -> Metered:
        """What to charge: by its units no more than the bound has, and without any a unit per UNIT_DOCUMENTS."""
        metered = Answer.metered(self, ask, bound)
        if not metered.requests:
            return metered
        units = -(-ask.prompts // UNIT_DOCUMENTS) if self.search_units is None else self.search_units
        return replace(metered, requests=max(1, min(units, bound.units.requests)))


def read_ranks(body: bytes) -> Ranks | None:
    """A whole answer of a reranker; None where it is not a JSON object, or an error. Anything that it shows is paid,
    whatever its shape."""
    document = document_of(body)
    if document is None:
        return None
    lists = [name for name in _RESULTS if isinstance(document.get(name), list)]
    shown = any(document[name] for name in lists) or shows_else(document, lists)
    meta = document.get("meta")
    said = meta.get("billed_units") if isinstance(meta, dict) else None
    units = said if isinstance(said, dict) else {}
    return Ranks(_usage_of(document, units), int(shown), 0, search_units=count(units, "search_units"))


def _usage_of(document: dict[str, Any], units: dict[str, Any]) -> Usage | None:
    usage = document.get("usage")
    if isinstance(usage, dict):
        return read_embeddings_usage(usage)
    tokens = count(units, "input_tokens")
    return Usage(tokens, 0) if tokens else None
