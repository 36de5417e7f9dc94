"""What a report of usage says, whichever API it came by, and its figures one by one.

Of every report the same is believed: a figure that cannot be one (negative, a fraction, a truth value, a text) is as
good as none, one that only a float can hold is taken as it is, and an absurd one is later cut to the bound. A report
in which every figure is 0 is none: no prompt is empty, but some servers fill in what they never counted.
"""

from collections.abc import Mapping
from typing import Any

from gateway.domain.value import value

#: The most that a figure is read as: beyond any bound, and small enough to be written down anywhere.
MOST_TOKENS = 2**63 - 1
_NONE: Mapping[str, Any] = {}


@value(frozen=True, slots=True)
class Usage:
    """What the upstream says, each ≥ 0 but otherwise unchecked. reasoning_tokens: the hidden part of the output. The
    audio and image tokens are parts of input and output, too."""

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

    def owed_unseen(self, answers: int) -> bool:
        """The same of a report of so many whole answers: each ends with a token that is never shown, and more output
        than that was made for something."""
        return self.unseen or self.output_tokens > max(1, answers)

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
            max(self.image_input_tokens, other.image_input_tokens),
            self.image_output_tokens + other.image_output_tokens,
        )


def count(usage: Mapping[str, Any], name: str) -> int | None:
    """A figure that can be one: whole and not negative; else None. Some servers write 7.0 for 7, and a whole number
    too large for the JSON library comes as a float."""
    value = usage.get(name)
    if type(value) is int and 0 <= value <= MOST_TOKENS:  # as nearly all are
        return value
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        return None
    return min(value, MOST_TOKENS)


def details(usage: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """The figures that another is made of; empty where there are none."""
    parts = usage.get(group)
    return parts if isinstance(parts, dict) else _NONE


def part(details: Mapping[str, Any], name: str) -> int:
    """A figure among them; 0 where it is missing or makes no sense."""
    return (count(details, name) or 0) if details.get(name) else 0


def either(usage: Mapping[str, Any], name: str, total: int | None, other: int | None) -> int | None:
    """The figure of that name. Where it is left out, what other leaves of total, if that is anything."""
    if usage.get(name) is not None:
        return count(usage, name)
    return total - other if total is not None and other is not None and total > other else None
