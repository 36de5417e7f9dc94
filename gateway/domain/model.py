"""What the gateway knows of a model that it sells."""

from dataclasses import dataclass

from gateway.domain.price import TokenPrices


@dataclass(frozen=True, slots=True)
class Model:
    """A priced model and the upstream that serves it.

    context_window, max_output_tokens: tokens. template_tokens: the most that the upstream's chat template adds
    to a prompt beyond one token per byte of the request.
    """

    name: str
    upstream: str
    prices: TokenPrices
    context_window: int
    max_output_tokens: int
    template_tokens: int = 256
