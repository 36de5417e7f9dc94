"""Usage as upstreams report it, and the tokens to charge for it: never below zero, never above the bound."""

from dataclasses import dataclass
from typing import Any

import orjson

from gateway.domain.price import Tokens
from gateway.domain.request import BYTES_PER_TOKEN, Ask, Bound, estimated_input


@dataclass(frozen=True, slots=True)
class Usage:
    """What the upstream says, each ≥ 0 but otherwise unchecked."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0

    def plus_output(self, other: "Usage") -> "Usage":
        """Of two reports for different answers to one prompt: outputs add up, the prompt counts once."""
        return Usage(
            max(self.input_tokens, other.input_tokens),
            self.output_tokens + other.output_tokens,
            max(self.cache_read_tokens, other.cache_read_tokens),
        )


def read_usage(usage: object) -> Usage | None:
    """The OpenAI-shaped ``usage`` object; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given = _count(usage, "prompt_tokens")
    made = _count(usage, "completion_tokens") if usage.get("completion_tokens") is not None else 0
    if given is None or made is None:
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    return Usage(given, made, cached or 0)


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None


def billed(usage: Usage, bound: Bound) -> Tokens:
    """The tokens to charge for a usage."""
    most = bound.tokens(bound.output_tokens_each)
    input_tokens = min(usage.input_tokens, most.input)
    return Tokens(
        input=input_tokens,
        output=min(usage.output_tokens, most.output),
        cache_read=min(usage.cache_read_tokens, input_tokens),
    )


def billed_without_usage(ask: Ask, bound: Bound, output_tokens: int) -> Tokens:
    """The tokens to charge where the upstream told none: input by its bytes, output as counted."""
    most = bound.tokens(bound.output_tokens_each)
    return Tokens(input=estimated_input(ask, bound), output=min(output_tokens, most.output))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. empty: there is nothing in it to pay for. output_tokens: counted by its text's bytes."""

    usage: Usage | None
    empty: bool
    output_tokens: int


def read_answer(body: bytes) -> Answer | None:
    """Read a non-streamed answer; None where it is not a JSON object."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("error"):
        return None
    items = document.get("choices", document.get("data"))
    content_bytes = sum(_content_bytes(item) for item in items) if isinstance(items, list) else 0
    usage = read_usage(document.get("usage"))
    empty = not content_bytes and not (usage and usage.output_tokens)
    return Answer(usage, empty, -(-content_bytes // BYTES_PER_TOKEN))


def _content_bytes(item: object) -> int:
    """Bytes of text in a choice (or of an embedding): zero for one with nothing in it."""
    if not isinstance(item, dict):
        return 0
    if "embedding" in item:
        return len(item["embedding"]) if isinstance(item["embedding"], (list, str)) else 0
    message = item.get("message")
    parts: list[object] = [item.get("text")]
    if isinstance(message, dict):
        parts += [value for name, value in message.items() if name != "role"]
    return sum(len(part.encode()) if isinstance(part, str) else len(orjson.dumps(part)) for part in parts if part)
