"""What a request asks of a model, and the most that it can use."""

from dataclasses import replace
from typing import Literal

from gateway.domain.metered import Images, Metered
from gateway.domain.model import Model
from gateway.domain.value import value

Operation = Literal[
    "chat",
    "text_completion",
    "embeddings",
    "rerank",
    "image_generation",
    "speech",
    "transcription",
    "realtime",
    "passthrough",
]

#: What a request uses of what is not tokens, if nothing else is said: it is a request.
NO_UNITS = Metered(requests=1)

#: Less output than this is no answer: a request that cannot hold it (or what it asks for, if less) is refused.
MIN_OUTPUT_TOKENS = 16

#: English text runs at about four bytes per token. Only used to charge input and output for which no upstream
#: gave a usage, and never beyond the bound.
BYTES_PER_TOKEN = 4

#: No tokenizer averages more characters per token than this. Where a request has several prompts or answers, an
#: upstream that reports fewer tokens has reported only some of them.
MOST_CHARACTERS_PER_TOKEN = 8


class InvalidRequest(ValueError):
    """The body cannot be priced. param: the field that is at fault, or None for the body as a whole."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@value(frozen=True, slots=True)
class Ask:
    """What a request asks for.

    input_bytes: UTF-8 bytes of its JSON, an upper bound of its text's tokens; None where it holds something other
    than text. template_bytes: what a chat template may make more of it. prompts: how many inputs;
    least_input_tokens: what several cannot be less than. completions: answers per prompt. max_tokens: most output
    tokens per answer that the client named. units: the most that it uses of what is not tokens; of images whose size or
    quality is AUTO, the dearest are meant. hides_output: what its stream shows says nothing about its cost, so that the
    most is held at once. indivisible: its output cannot be limited, so that the most is held or nothing.
    likely_audio_ms: how long its audio probably is, for where no upstream tells; exact_audio: that is no guess.
    answer_format: by the API's own name; empty where there is one only.
    """

    operation: Operation
    model: str
    input_bytes: int | None
    prompts: int = 1
    completions: int = 1
    template_bytes: int = 0
    least_input_tokens: int = 0
    max_tokens: int | None = None
    echo: bool = False
    stream: bool = False
    wants_usage: bool = False
    wants_running_usage: bool = False
    units: Metered = NO_UNITS
    hides_output: bool = False
    indivisible: bool = False
    likely_audio_ms: int = 0
    exact_audio: bool = False
    answer_format: str = ""

    def of_size(self, size_bytes: int) -> "Ask":
        """Itself, with the size of the body that will be forwarded added: once, by who has read it."""
        if self.input_bytes is not None:  # a copy of so many fields takes 5 µs
            self.input_bytes += size_bytes  # type: ignore[misc]
        return self


@value(frozen=True, slots=True)
class Bound:
    """The most that a request can use: input tokens in all, output tokens of each of its answers, and what is not
    tokens. indivisible: less output cannot be asked for."""

    input_tokens: int
    answers: int
    output_tokens_each: int
    echo: bool = False
    units: Metered = NO_UNITS
    indivisible: bool = False

    def output_tokens(self, output_tokens_each: int) -> int:
        """The output of all answers if each has output_tokens_each tokens, with the prompts that they repeat."""
        return self.answers * (output_tokens_each + self.input_tokens if self.echo else output_tokens_each)

    @property
    def most_output_tokens(self) -> int:
        """The most output of all answers."""
        return self.output_tokens(self.output_tokens_each) if self.echo else self.answers * self.output_tokens_each

    def metered(self, output_tokens_each: int) -> Metered:
        """The use if every answer has output_tokens_each tokens."""
        return replace(self.units, input=self.input_tokens, output=self.output_tokens(output_tokens_each))


def bound_of(ask: Ask, model: Model) -> Bound:
    """The most that ask can use of model."""
    prompts, window = ask.prompts, model.context_window
    input_tokens = window * prompts
    if ask.input_bytes is not None:
        text_tokens = ask.input_bytes + ask.template_bytes + model.template_tokens * prompts
        input_tokens = text_tokens if text_tokens < input_tokens else input_tokens
    units = ask.units if ask.units is NO_UNITS else _most_units(ask.units, model)
    answers = ask.completions * prompts
    if not answers:
        return Bound(input_tokens, 0, 0, units=units)
    most, asked = model.max_output_tokens, ask.max_tokens
    most = most if most < window else window
    if asked is None:
        # Servers refuse a max_tokens that does not fit beside the prompt. The client named none, so what is put
        # in must fit: beside the bound where that is small, else beside three quarters of the context window.
        beside = min(input_tokens // prompts, window * 3 // 4)
        most = max(1, min(most, window - beside))
    elif asked < most:
        most = asked
    return Bound(input_tokens, answers, most, ask.echo, units, ask.indivisible)


def _most_units(units: Metered, model: Model) -> Metered:
    """What is not tokens, as far as the model goes: of images the dearest that can be meant."""
    images = tuple(
        Images(*model.prices.dearest_image(images.size, images.quality), images.count) for images in units.images
    )
    longest_ms = model.max_audio_ms or units.audio_ms
    return replace(units, images=images if model.prices.images else (), audio_ms=min(units.audio_ms, longest_ms))


def least_output(bound: Bound) -> int:
    """The output per answer below which the request is not worth forwarding."""
    most = bound.output_tokens_each
    return most if bound.indivisible or most < MIN_OUTPUT_TOKENS else MIN_OUTPUT_TOKENS


def worst_parts(bound: Bound, model: Model) -> tuple[int, int]:
    """The dearest cost that the use can have, in femto-credits: of all but its answers (all input at the dearest input
    price, what is not tokens, the prompts that answers repeat), and of one token more in each of its answers."""
    prices, input_tokens = model.prices, bound.input_tokens
    dearest_input, dearest_output = prices.dearest_femto(input_tokens)
    fixed, token = input_tokens * dearest_input, bound.answers * dearest_output
    if prices.sells_units:
        fixed += prices.units_femto(bound.units)
    return (fixed + input_tokens * token if bound.echo else fixed), token


def worst_femto(bound: Bound, model: Model, output_tokens_each: int) -> int:
    """The dearest cost if no answer has more than output_tokens_each tokens, in femto-credits."""
    fixed, token = worst_parts(bound, model)
    return fixed + output_tokens_each * token


def affordable_output(bound: Bound, model: Model, femto: int) -> int:
    """The most output tokens per answer whose cost, with the input's, stays within femto; 0 if none does."""
    fixed, token = worst_parts(bound, model)
    if femto < fixed:
        return 0
    most = bound.output_tokens_each
    return min(most, (femto - fixed) // token) if token else most


def estimated_input(ask: Ask, bound: Bound) -> int:
    """Input tokens to charge where no upstream told them: the documented rule, within the bound."""
    if ask.input_bytes is None:
        return bound.input_tokens
    return min(bound.input_tokens, -(-ask.input_bytes // BYTES_PER_TOKEN))
