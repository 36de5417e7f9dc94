"""POST /rerank: a query and documents in, the documents' ranks out."""

from typing import Any

import orjson

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, items, text
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import Ask, InvalidRequest
from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.ranks import UNIT_DOCUMENTS, read_ranks

MAX_DOCUMENTS = 2048
#: What a search unit covers of a long document, where an upstream bills by them: so many tokens.
UNIT_TOKENS = 500

# The keys of a document that is text. Any other may stand for an image or a file, here or behind a link: then its bytes
# bound nothing, and the whole context window is held for each document.
_TEXT_KEYS = frozenset({"id", "title", "text"})


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
        return read_ranks(body)

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
            0 if all(map(_is_text, documents)) else None,
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
        try:
            return len(orjson.dumps(document))
        except orjson.JSONEncodeError as error:
            raise InvalidRequest("it is nested too deeply", f"documents[{index}]") from error
    raise InvalidRequest("each document must be a string or an object", f"documents[{index}]")


def _is_text(document: str | dict[str, Any]) -> bool:
    """Whether no token of a document is without a byte."""
    if isinstance(document, str):
        return True
    filled = {name: value for name, value in document.items() if value is not None and value != []}
    return filled.keys() <= _TEXT_KEYS and all(isinstance(value, (str, int)) for value in filled.values())
