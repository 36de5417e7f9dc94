"""Prices per token and the cost of a use, exact to the nano-credit."""

from dataclasses import dataclass
from decimal import Decimal

from gateway.domain.plan import FULL_RATE_PPM

#: Prices are held as femto-credits (1e-15 credit) per token: 0.0305 USD per million tokens is 30_500_000.
FEMTO_PER_CREDIT = 10**15
FEMTO_PER_NANO = 10**6


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one request by kind. cache_read and cache_write are parts of input, never beside it."""

    input: int
    output: int
    cache_read: int = 0
    cache_write: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a use costs, in nano-credits: at list price from prepaid credits, at the plan's rate from the
    allowance. Each is rounded once, up, from the same exact figure."""

    payg_nano: int
    plan_nano: int


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """List prices of one model in femto-credits per token, each ≥ 0. None for a cache kind: the input price."""

    input_femto: int
    output_femto: int
    cache_read_femto: int | None = None
    cache_write_femto: int | None = None

    @property
    def cache_read(self) -> int:
        """What a token read from the cache costs, in femto-credits."""
        return self.input_femto if self.cache_read_femto is None else self.cache_read_femto

    @property
    def cache_write(self) -> int:
        """What a token written to the cache costs, in femto-credits."""
        return self.input_femto if self.cache_write_femto is None else self.cache_write_femto

    def femto(self, tokens: Tokens) -> int:
        """The exact cost in femto-credits."""
        plain = tokens.input - tokens.cache_read - tokens.cache_write
        return (
            plain * self.input_femto
            + tokens.cache_read * self.cache_read
            + tokens.cache_write * self.cache_write
            + tokens.output * self.output_femto
        )

    def cost(self, tokens: Tokens, rate_ppm: int) -> Cost:
        """The cost of tokens to an account whose plan pays rate_ppm of the list price."""
        return cost_of(self.femto(tokens), rate_ppm)

    def dearest_input_femto(self) -> int:
        """The most that one input token can cost, whichever kind the upstream will say it was."""
        return max(self.input_femto, self.cache_read, self.cache_write)


def cost_of(femto: int, rate_ppm: int) -> Cost:
    """Round an exact cost up to nano-credits, at list price and at the plan's rate."""
    return Cost(
        payg_nano=-(-femto // FEMTO_PER_NANO),
        plan_nano=-(-femto * rate_ppm // (FEMTO_PER_NANO * FULL_RATE_PPM)),
    )


def femto_per_token(usd_per_token: Decimal) -> int:
    """The integer price of a decimal USD price per token. Raises ValueError beyond 15 decimals."""
    femto = usd_per_token * FEMTO_PER_CREDIT
    if femto != int(femto):
        raise ValueError("has more decimals than the gateway can charge exactly (15 per token, 9 per million)")
    return int(femto)


def usd_per_token(femto: int) -> Decimal:
    """The decimal USD price per token, as models lists show it."""
    return Decimal(femto) / FEMTO_PER_CREDIT
