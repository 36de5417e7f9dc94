"""What the gateway knows of a model that it sells."""

from gateway.domain.price import Prices
from gateway.domain.value import value

#: How many other models may answer in a model's place.
MAX_FALLBACKS = 4


@value(frozen=True, slots=True)
class Model:
    """A priced model and the upstream that serves it.

    context_window, max_output_tokens: tokens; 0 where it sells none and none were named, so that none are counted.
    template_tokens: the most that the upstream's chat template adds to a prompt beyond one token per byte of the
    request. hidden_reasoning: it bills reasoning that it does not stream, so that what a stream shows says nothing
    about its cost. price_version: 8 hex digits that stand for the prices. sent_as: what the upstream calls it, if not
    the same; else empty. max_audio_ms: the longest audio that the upstream takes; 0 where that is not known. fallbacks:
    the models that answer in its place, in this order, at their own prices, where its upstream fails before it answers.
    """

    name: str
    upstream: str
    prices: Prices
    context_window: int
    max_output_tokens: int
    template_tokens: int = 256
    hidden_reasoning: bool = False
    price_version: str = ""
    sent_as: str = ""
    max_audio_ms: int = 0
    fallbacks: tuple[str, ...] = ()
