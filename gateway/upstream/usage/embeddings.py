"""Usage and answers of embeddings: there is only input.

Where figures disagree: ``prompt_tokens`` is believed before ``total_tokens``, which is the input too where the other is
left out. What a server reports as output is charged to nobody: the endpoint sells none.
"""

from typing import Any

from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.figures import Usage, count, details, part
from gateway.upstream.usage.shown import answer_of, document_of, shows_else


def read_embeddings_usage(usage: object) -> Usage | None:
    """The ``usage`` object of embeddings; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given = count(usage, "total_tokens" if usage.get("prompt_tokens") is None else "prompt_tokens")
    if not given:
        return None
    inputs = details(usage, "prompt_tokens_details")
    return Usage(
        given,
        0,
        cache_read_tokens=part(inputs, "cached_tokens"),
        audio_input_tokens=part(inputs, "audio_tokens"),
        image_input_tokens=part(inputs, "image_tokens"),
    )


def read_embeddings(body: bytes) -> Answer | None:
    """A whole answer of the embeddings endpoint; None where it is not a JSON object, or an error."""
    document = document_of(body)
    if document is None:
        return None
    data = document.get("data")
    vectors = [item for item in data if _holds_any(item)] if isinstance(data, list) else []
    shown = bool(vectors) or shows_else(document, ("data",) if isinstance(data, list) else ())
    return answer_of(["vectors"] if shown else [], read_embeddings_usage(document.get("usage")))


def _holds_any(item: Any) -> bool:
    """Whether there is anything in an entry but its place."""
    if isinstance(item, dict):
        return any(value for name, value in item.items() if name not in ("index", "object"))
    return bool(item)
