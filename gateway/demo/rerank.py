"""POST /rerank: documents by how many of the query's words they have."""

import re

from aiohttp import web

from gateway.demo.fields import Body, boolean, integer, made_id, read_body, required_text
from gateway.demo.refusal import Refused, as_json
from gateway.demo.words import count_tokens

MAX_DOCUMENTS = 1000
UNIT_DOCUMENTS = 100

_WORD = re.compile(r"\w+")


async def rerank(request: web.Request) -> web.Response:
    """The documents, best first: the score is the share of the query's words that a document has."""
    body = await read_body(request)
    query = required_text(body, "query", 100_000)
    documents = _documents(body)
    top = integer(body, "top_n") or len(documents)
    wanted = _words_of(query)
    results = [
        {"index": index, "relevance_score": round(len(wanted & _words_of(document)) / max(1, len(wanted)), 6)}
        | ({"document": {"text": document}} if boolean(body, "return_documents") else {})
        for index, document in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    # The query is read with each document.
    tokens = count_tokens(query) * len(documents) + sum(map(count_tokens, documents))
    return as_json(
        {
            "id": made_id("rerank-demo-", await request.read()),
            "model": body["model"],
            "results": results[:top],
            "meta": {"billed_units": {"search_units": -(-len(documents) // UNIT_DOCUMENTS)}},
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _words_of(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _documents(body: Body) -> list[str]:
    given = body.get("documents")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_DOCUMENTS:
        raise Refused(f"documents must be a list of 1 to {MAX_DOCUMENTS}", "documents")
    texts = [item.get("text") if isinstance(item, dict) else item for item in given]
    if not all(isinstance(text, str) for text in texts):
        raise Refused("a document must be a text, or an object with a text", "documents")
    return [str(text) for text in texts]
