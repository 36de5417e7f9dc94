"""Usage as upstreams report it, and the tokens to charge for it: never below zero, never above the bound."""

from dataclasses import dataclass, replace
from typing import Any

import orjson

from gateway.domain.metered import Metered
from gateway.domain.request import BYTES_PER_TOKEN, MOST_CHARACTERS_PER_TOKEN, Ask, Bound, estimated_input

#: What is charged for in the usage of a message.
MESSAGE_USAGE_FIELDS = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "output_tokens",
    "output_tokens_details",
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the upstream says, each ≥ 0 but otherwise unchecked. reasoning_tokens: the hidden part of the output. The
    audio tokens are parts of input and output, too."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0

    @property
    def unseen(self) -> bool:
        """Whether it tells of what is paid for even where the answer shows nothing: secret reasoning, or a prompt that
        was kept, which makes the next request cheap."""
        return bool(self.reasoning_tokens or self.cache_write_tokens)

    def plus(self, other: "Usage", *, same_prompt: bool) -> "Usage":
        """Of two reports, each for one answer: both together. The answers to one prompt share its input."""
        return Usage(
            max(self.input_tokens, other.input_tokens) if same_prompt else self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            max(self.cache_read_tokens, other.cache_read_tokens),
            max(self.cache_write_tokens, other.cache_write_tokens),
            self.reasoning_tokens + other.reasoning_tokens,
            max(self.audio_input_tokens, other.audio_input_tokens),
            self.audio_output_tokens + other.audio_output_tokens,
        )


def read_usage(usage: object, *, has_output: bool = True) -> Usage | None:
    """The ``usage`` object of OpenAI's completions; None where it is missing or makes no sense. has_output: whether the
    endpoint makes tokens."""
    if not isinstance(usage, dict):
        return None
    given = count(usage, "prompt_tokens")
    made = _output(usage, given) if has_output else count(usage, "completion_tokens") or 0
    if given is None or made is None:
        return None
    return Usage(
        given,
        made,
        _detail(usage, "prompt_tokens_details", "cached_tokens"),
        _detail(usage, "prompt_tokens_details", "cache_write_tokens"),
        _detail(usage, "completion_tokens_details", "reasoning_tokens"),
        _detail(usage, "prompt_tokens_details", "audio_tokens"),
        _detail(usage, "completion_tokens_details", "audio_tokens"),
    )


def read_response_usage(usage: object) -> Usage | None:
    """The ``usage`` object of the Responses API; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if given is None or made is None:
        return None
    return Usage(
        given,
        made,
        _detail(usage, "input_tokens_details", "cached_tokens"),
        _detail(usage, "input_tokens_details", "cache_write_tokens"),
        _detail(usage, "output_tokens_details", "reasoning_tokens"),
    )


def read_message_usage(usage: object) -> Usage | None:
    """The ``usage`` object of Anthropic's Messages API, whose input_tokens are those that the cache had no part in;
    None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    fresh, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if fresh is None or made is None:
        return None
    read = count(usage, "cache_read_input_tokens") or 0
    written = count(usage, "cache_creation_input_tokens") or 0
    reasoning = _detail(usage, "output_tokens_details", "thinking_tokens")
    return Usage(fresh + read + written, made, read, written, reasoning)


def _output(usage: dict[str, Any], given: int | None) -> int | None:
    if usage.get("completion_tokens") is not None:
        return count(usage, "completion_tokens")
    total = count(usage, "total_tokens")
    return total - given if total is not None and given is not None and total > given else None


def _detail(usage: dict[str, Any], group: str, name: str) -> int:
    details = usage.get(group)
    return (count(details, name) or 0) if isinstance(details, dict) else 0


def count(usage: dict[str, Any], name: str) -> int | None:
    """A figure that can be one: whole and not negative; else None."""
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None


def exceeds(usage: Usage, bound: Bound) -> bool:
    """Whether the upstream reports more than it was allowed: the operator may be billed for it, the customer is not."""
    most = bound.metered(bound.output_tokens_each)
    return usage.input_tokens > most.input or usage.output_tokens > most.output


def billed(usage: Usage, ask: Ask, bound: Bound, least_output_tokens: int = 0) -> Metered:
    """The tokens to charge for a usage: at least what several prompts and answers show, at most the bound. Of parts
    that do not fit into the whole, the last ones are cut."""
    most = bound.metered(bound.output_tokens_each)
    input_tokens = min(max(usage.input_tokens, ask.least_input_tokens), most.input)
    output_tokens = min(max(usage.output_tokens, least_output_tokens), most.output)
    read = min(usage.cache_read_tokens, input_tokens)
    written = min(usage.cache_write_tokens, input_tokens - read)
    spoken = min(usage.audio_output_tokens, output_tokens)
    return replace(
        bound.units,
        input=input_tokens,
        output=output_tokens,
        cache_read=read,
        cache_write=written,
        audio_input=min(usage.audio_input_tokens, input_tokens - read - written),
        audio_output=spoken,
        reasoning=min(usage.reasoning_tokens, output_tokens - spoken),
    )


def billed_without_usage(ask: Ask, bound: Bound, output_tokens: int) -> Metered:
    """The tokens to charge where the upstream told none: input by its bytes, output as counted."""
    most = bound.metered(bound.output_tokens_each)
    return replace(bound.units, input=estimated_input(ask, bound), output=min(output_tokens, most.output))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. content_bytes, characters: of the text in all its choices."""

    usage: Usage | None
    content_bytes: int
    characters: int

    @property
    def empty(self) -> bool:
        """There is nothing in it to pay for, neither to read nor unseen."""
        return not self.content_bytes and not (self.usage and self.usage.unseen)

    def metered(self, ask: Ask, bound: Bound) -> Metered:
        """The tokens to charge."""
        if self.empty:
            return Metered()
        if self.usage is None:
            return billed_without_usage(ask, bound, -(-self.content_bytes // BYTES_PER_TOKEN))
        least = self.characters // MOST_CHARACTERS_PER_TOKEN if bound.answers > 1 else 0
        return billed(self.usage, ask, bound, least)


def read_choices(body: bytes) -> Answer | None:
    """A whole answer of the completions endpoints; None where it is not a JSON object, or an error."""
    return _read_answer(body, "choices", has_output=True)


def read_embeddings(body: bytes) -> Answer | None:
    """A whole answer of the embeddings endpoint; None where it is not a JSON object, or an error."""
    return _read_answer(body, "data", has_output=False)


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
        texts.append(_text(stop))  # said by the model, and may be all that a client wants to know
    return Answer(
        read_message_usage(document.get("usage")),
        sum(len(text.encode(errors="replace")) for text in texts),
        sum(len(text) for text in texts),
    )


def _texts_of_block(block: object) -> list[str]:
    """What there is to read in a block of a message; citations are free."""
    if not isinstance(block, dict):
        return []
    return [_text(part) for name, part in block.items() if part and name not in ("type", "id", "caller", "citations")]


def _read_answer(body: bytes, items_name: str, *, has_output: bool) -> Answer | None:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or document.get("error"):
        return None
    items = document.get(items_name)
    texts = [text for item in items for text in _texts(item)] if isinstance(items, list) else []
    return Answer(
        read_usage(document.get("usage"), has_output=has_output),
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
