"""What the gateway knows of a model that it sells."""

from dataclasses import dataclass

from gateway.domain.price import Prices


@dataclass(frozen=True, slots=True)
class Model:
    """A priced model and the upstream that serves it.

    context_window, max_output_tokens: tokens; 0 where it sells none and none were named, so that none are counted.
    template_tokens: the most that the upstream's chat template adds to a prompt beyond one token per byte of the
    request. hidden_reasoning: it bills reasoning that it does not stream, so that what a stream shows says nothing
    about its cost. price_version: 8 hex digits that stand for the prices. sent_as: what the upstream calls it, if not
    the same; else empty.
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
