"""Usage as upstreams report it, and the tokens to charge for it: never below zero, never above the bound."""

from dataclasses import dataclass
from typing import Any

import orjson

from gateway.domain.price import Tokens
from gateway.domain.request import BYTES_PER_TOKEN, MOST_CHARACTERS_PER_TOKEN, Ask, Bound, Operation, estimated_input


@dataclass(frozen=True, slots=True)
class Usage:
    """What the upstream says, each ≥ 0 but otherwise unchecked. reasoning_tokens: the hidden part of the output."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def plus(self, other: "Usage", *, same_prompt: bool) -> "Usage":
        """Of two reports, each for one answer: both together. The answers to one prompt share its input."""
        return Usage(
            max(self.input_tokens, other.input_tokens) if same_prompt else self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            max(self.cache_read_tokens, other.cache_read_tokens),
            max(self.cache_write_tokens, other.cache_write_tokens),
            self.reasoning_tokens + other.reasoning_tokens,
        )


def read_usage(usage: object, operation: Operation) -> Usage | None:
    """The OpenAI-shaped ``usage`` object; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given = _count(usage, "prompt_tokens")
    made = _output(usage, given, operation)
    if given is None or made is None:
        return None
    return Usage(
        given,
        made,
        _detail(usage, "prompt_tokens_details", "cached_tokens"),
        _detail(usage, "prompt_tokens_details", "cache_write_tokens"),
        _detail(usage, "completion_tokens_details", "reasoning_tokens"),
    )


def _output(usage: dict[str, Any], given: int | None, operation: Operation) -> int | None:
    if usage.get("completion_tokens") is not None:
        return _count(usage, "completion_tokens")
    if operation == "embeddings":
        return 0
    total = _count(usage, "total_tokens")
    return total - given if total is not None and given is not None and total > given else None


def _detail(usage: dict[str, Any], group: str, name: str) -> int:
    details = usage.get(group)
    return (_count(details, name) or 0) if isinstance(details, dict) else 0


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None


def exceeds(usage: Usage, bound: Bound) -> bool:
    """Whether the upstream reports more than it was allowed: the operator may be billed for it, the customer is not."""
    most = bound.tokens(bound.output_tokens_each)
    return usage.input_tokens > most.input or usage.output_tokens > most.output


def billed(usage: Usage, ask: Ask, bound: Bound, least_output_tokens: int = 0) -> Tokens:
    """The tokens to charge for a usage: at least what several prompts and answers show, at most the bound."""
    most = bound.tokens(bound.output_tokens_each)
    input_tokens = min(max(usage.input_tokens, ask.least_input_tokens), most.input)
    read = min(usage.cache_read_tokens, input_tokens)
    return Tokens(
        input=input_tokens,
        output=min(max(usage.output_tokens, least_output_tokens), most.output),
        cache_read=read,
        cache_write=min(usage.cache_write_tokens, input_tokens - read),
    )


def billed_without_usage(ask: Ask, bound: Bound, output_tokens: int) -> Tokens:
    """The tokens to charge where the upstream told none: input by its bytes, output as counted."""
    most = bound.tokens(bound.output_tokens_each)
    return Tokens(input=estimated_input(ask, bound), output=min(output_tokens, most.output))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. content_bytes, characters: of the text in all its choices."""

    usage: Usage | None
    content_bytes: int
    characters: int

    @property
    def empty(self) -> bool:
        """There is nothing in it to pay for, neither to read nor reasoned in secret."""
        return not self.content_bytes and not (self.usage and self.usage.reasoning_tokens)

    def tokens(self, ask: Ask, bound: Bound) -> Tokens:
        """The tokens to charge."""
        if self.empty:
            return Tokens(0, 0)
        if self.usage is None:
            return billed_without_usage(ask, bound, -(-self.content_bytes // BYTES_PER_TOKEN))
        least = self.characters // MOST_CHARACTERS_PER_TOKEN if bound.answers > 1 else 0
        return billed(self.usage, ask, bound, least)


def read_answer(body: bytes, operation: Operation) -> Answer | None:
    """Read a non-streamed answer; None where it is not a JSON object."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("error"):
        return None
    items = document.get("data" if operation == "embeddings" else "choices")
    texts = [text for item in items for text in _texts(item)] if isinstance(items, list) else []
    return Answer(
        read_usage(document.get("usage"), operation),
        sum(len(text.encode(errors="replace")) for text in texts),
        sum(len(text) for text in texts),
    )


def _texts(item: object) -> list[str]:
    """What there is to read in a choice (or in an embedding)."""
    if not isinstance(item, dict):
        return []
    if "embedding" in item:
        return ["embedding"] if item["embedding"] else []
    message = item.get("message")
    if not isinstance(message, dict):
        return [text] if isinstance(text := item.get("text"), str) and text else []
    # Some servers send reasoning under both of its names.
    twice = "reasoning_content" if message.get("reasoning") else ""
    return [_text(part) for name, part in message.items() if part and name not in ("role", twice)]


def _text(part: object) -> str:
    if isinstance(part, str):
        return part
    try:
        return orjson.dumps(part).decode()
    except orjson.JSONEncodeError:
        return "…"  # nested deeper than the library writes: there is something, of unknown length
