"""Usage and answers of Anthropic's Messages API, whose ``input_tokens`` are those that the cache had no part in: the
input is the sum of all three kinds.

Where figures disagree: kinds of input that are left out are 0, and so is a cache that makes no sense; without
``input_tokens`` and ``output_tokens`` there is no usage. In a stream each figure is a total so far, told at the start
and again at the end: the larger one counts, because some servers end with a 0. How long a written token is kept
(``cache_creation``) is not looked at: only one length is let through.
"""

import orjson

from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.figures import Usage, count, details, part
from gateway.upstream.usage.shown import answer_of, as_text

#: What is charged for in the usage of a message.
MESSAGE_USAGE_FIELDS = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "output_tokens",
    "output_tokens_details",
)


def read_message_usage(usage: object) -> Usage | None:
    """The ``usage`` object of a message; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    fresh, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if fresh is None or made is None:
        return None
    read = count(usage, "cache_read_input_tokens") or 0
    written = count(usage, "cache_creation_input_tokens") or 0
    if not (fresh or read or written or made):
        return None
    reasoning = part(details(usage, "output_tokens_details"), "thinking_tokens")
    return Usage(fresh + read + written, made, read, written, reasoning)


def read_message(body: bytes) -> Answer | None:
    """A whole message; None where it is none."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("type") != "message":
        return None
    blocks = document.get("content")
    texts = [text for block in blocks for text in _texts_of_block(block)] if isinstance(blocks, list) else []
    if stop := document.get("stop_sequence"):
        texts.append(as_text(stop))  # said by the model, and may be all that a client wants to know
    return answer_of(texts, read_message_usage(document.get("usage")))


def _texts_of_block(block: object) -> list[str]:
    """What there is to read in a block of a message; citations are free."""
    if not isinstance(block, dict):
        return []
    return [as_text(part) for name, part in block.items() if part and name not in ("type", "id", "caller", "citations")]
