"""What is charged: for a report of usage, and where there is none."""

from collections.abc import Sequence
from dataclasses import field, replace

from gateway.domain.metered import Metered
from gateway.domain.request import BYTES_PER_TOKEN, MOST_CHARACTERS_PER_TOKEN, Ask, Bound, estimated_input
from gateway.domain.value import value
from gateway.upstream.usage.figures import Usage


def exceeds(usage: Usage, bound: Bound) -> bool:
    """Whether the upstream reports more than it was allowed: the operator may be billed for it, the customer is not."""
    return usage.input_tokens > bound.input_tokens or usage.output_tokens > bound.most_output_tokens


def billed(usage: Usage, ask: Ask, bound: Bound, least_output_tokens: int = 0) -> Metered:
    """The tokens to charge for a usage: at least what several prompts and answers show, at most the bound. Of parts
    that do not fit into the whole the last ones are cut, in this order: read from the cache, written to it, audio,
    images; and of the output audio, images, reasoning."""
    input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
    least_input_tokens, most_output_tokens = ask.least_input_tokens, bound.most_output_tokens
    # Nearly all are as they may be: to look first is a third of the work.
    if not least_input_tokens <= input_tokens <= bound.input_tokens:
        input_tokens = min(max(input_tokens, least_input_tokens), bound.input_tokens)
    if not least_output_tokens <= output_tokens <= most_output_tokens:
        output_tokens = min(max(output_tokens, least_output_tokens), most_output_tokens)
    read, written, heard, seen = (
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.audio_input_tokens,
        usage.image_input_tokens,
    )
    spoken, drawn, reasoning = usage.audio_output_tokens, usage.image_output_tokens, usage.reasoning_tokens
    if read + written + heard + seen > input_tokens:
        read, written, heard, seen = _fitting(input_tokens, (read, written, heard, seen))
    if spoken + drawn + reasoning > output_tokens:
        spoken, drawn, reasoning = _fitting(output_tokens, (spoken, drawn, reasoning))
    units = bound.units
    return Metered(
        input_tokens,
        output_tokens,
        read,
        written,
        heard,
        seen,
        spoken,
        drawn,
        reasoning,
        units.images,
        units.audio_ms,
        units.characters,
        units.requests,
    )


def _fitting(whole: int, parts: Sequence[int]) -> Sequence[int]:
    """Of each part what those before it leave of the whole."""
    fitting = []
    for part in parts:
        fitting.append(min(part, whole))
        whole -= fitting[-1]
    return fitting


def billed_without_usage(ask: Ask, bound: Bound, output_tokens: int) -> Metered:
    """The tokens to charge where the upstream told none: input by its bytes, output as counted."""
    output = min(output_tokens, bound.most_output_tokens)
    return replace(bound.units, input=estimated_input(ask, bound), output=output)


@value(frozen=True, slots=True)
class Answer:
    """A whole answer. content_bytes, characters: of the text in all its choices. signs: tokens of which something else
    than text tells."""

    usage: Usage | None
    content_bytes: int
    characters: int
    signs: int = field(default=0, kw_only=True)

    @property
    def empty(self) -> bool:
        """There is nothing in it to learn."""
        return not self.content_bytes and not self.signs

    def metered(self, ask: Ask, bound: Bound) -> Metered:
        """The tokens to charge."""
        usage = self.usage
        if not (self.content_bytes or self.signs or (usage and usage.owed_unseen(bound.answers))):
            return Metered()
        if usage is None:
            return billed_without_usage(ask, bound, max(-(-self.content_bytes // BYTES_PER_TOKEN), self.signs))
        # Some servers report one answer of several, and some count nothing of what they say.
        doubtful = bound.answers > 1 or not usage.output_tokens
        return billed(usage, ask, bound, self.characters // MOST_CHARACTERS_PER_TOKEN if doubtful else 0)
