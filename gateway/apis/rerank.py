"""POST /rerank: a query and documents in, the documents' ranks out."""

from dataclasses import dataclass, replace
from typing import Any

import orjson

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, items, text
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.upstream.usage import Answer, Usage, count

MAX_DOCUMENTS = 2048
#: What a search unit covers where an upstream bills by them: so many documents, and of a longer one so many tokens.
UNIT_DOCUMENTS, UNIT_TOKENS = 100, 500


@dataclass(frozen=True, slots=True)
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


class Rerank(Api):
    """The query is read with each document. There is no output to charge."""

    path = "/rerank"
    name = "rerank"
    operation = "rerank"
    fields = EVERYWHERE | frozenset(
        "query documents top_n top_k return_documents rank_fields max_chunks_per_doc max_tokens_per_doc "
        "truncate_prompt_tokens truncation overlap_tokens priority".split()
    )

    def check_sold(self, ask: Ask, model: Model) -> None:
        """By its tokens, or by the request: a search unit is one."""
        if model.prices.tokens is None and model.prices.request_femto is None:
            raise self.unsold(ask)

    def read_answer(self, body: bytes) -> Answer | None:
        """An answer with results."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(document, dict) or document.get("error"):
            return None
        results = document.get("results") or document.get("data")
        meta = document.get("meta")
        billed = meta.get("billed_units") if isinstance(meta, dict) else None
        billed = billed if isinstance(billed, dict) else {}
        tokens = _tokens_of(document, billed)
        return Ranks(
            Usage(tokens, 0) if tokens is not None else None,
            len(results) if isinstance(results, list) else 0,
            0,
            count(billed, "search_units"),
        )

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        query = text(body, "query")
        if query is None:
            raise InvalidRequest("'query' must be a string", "query")
        documents = items(body, "documents")
        if not documents or len(documents) > MAX_DOCUMENTS:
            raise InvalidRequest(f"'documents' must be an array of 1 to {MAX_DOCUMENTS} entries", "documents")
        query_bytes = len(query.encode())
        sizes = [_size_of(document, index) for index, document in enumerate(documents)]
        parts = sum(-(-(size + query_bytes) // UNIT_TOKENS) or 1 for size in sizes)
        return Ask(
            self.operation,
            model,
            0,
            prompts=len(documents),
            completions=0,
            template_bytes=query_bytes * (len(documents) - 1),
            units=Metered(requests=-(-parts // UNIT_DOCUMENTS)),
        )


def _size_of(document: object, index: int) -> int:
    """Bytes of a document, whichever of its fields are ranked."""
    if isinstance(document, str):
        return len(document.encode())
    if isinstance(document, dict):
        return len(orjson.dumps(document))
    raise InvalidRequest("each document must be a string or an object", f"documents[{index}]")


def _tokens_of(document: dict[str, Any], billed: dict[str, Any]) -> int | None:
    usage = document.get("usage")
    if isinstance(usage, dict):
        tokens = count(usage, "prompt_tokens")
        return count(usage, "total_tokens") if tokens is None else tokens
    return count(billed, "input_tokens")
