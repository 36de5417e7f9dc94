"""Prices and the cost of a use, exact to the nano-credit.

One object prices a request twice: before it is forwarded, by ``most_femto`` of the most that it can use, and
afterwards, by ``femto`` of what it used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import field
from decimal import Decimal
from itertools import product
from types import MappingProxyType

from gateway.domain.metered import Metered
from gateway.domain.plan import FULL_RATE_PPM
from gateway.domain.value import value

#: Prices are held as femto-credits (1e-15 credit) per unit: 0.0305 USD per million tokens is 30_500_000 per token.
FEMTO_PER_CREDIT = 10**15
FEMTO_PER_NANO = 10**6
_FEMTO_PPM_PER_NANO = FEMTO_PER_NANO * FULL_RATE_PPM
#: In a table of image prices: any size, or any quality.
ANY = "*"
#: Of an image: a size or a quality that the upstream chooses.
AUTO = "auto"
MAX_TIERS = 4


@value(frozen=True, slots=True)
class Cost:
    """What a use costs, in nano-credits: at list price from prepaid credits, at the plan's rate from the
    allowance. Each is rounded once, up, from the same exact figure."""

    payg_nano: int
    plan_nano: int


@value(frozen=True, slots=True)
class TokenPrices:
    """List prices in femto-credits per token, each ≥ 0. None for a part of the input: the input price; for a part of
    the output: the output price."""

    input_femto: int
    output_femto: int
    cache_read_femto: int | None = None
    cache_write_femto: int | None = None
    audio_input_femto: int | None = None
    image_input_femto: int | None = None
    audio_output_femto: int | None = None
    image_output_femto: int | None = None
    reasoning_femto: int | None = None
    _input_kinds: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _output_kinds: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # What a token of a kind costs beyond one of no kind; less than 0 where it is cheaper.
    _cache_read_more: int = field(init=False, repr=False, compare=False)
    _cache_write_more: int = field(init=False, repr=False, compare=False)
    _rare_more: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of all others; empty where all are 0

    def __post_init__(self) -> None:
        given, made = self.input_femto, self.output_femto
        inputs = (self.cache_read_femto, self.cache_write_femto, self.audio_input_femto, self.image_input_femto)
        outputs = (self.audio_output_femto, self.image_output_femto, self.reasoning_femto)
        object.__setattr__(self, "_input_kinds", tuple(_or(kind, given) for kind in inputs))
        object.__setattr__(self, "_output_kinds", tuple(_or(kind, made) for kind in outputs))
        more = *(kind - given for kind in self._input_kinds), *(kind - made for kind in self._output_kinds)
        object.__setattr__(self, "_cache_read_more", more[0])
        object.__setattr__(self, "_cache_write_more", more[1])
        object.__setattr__(self, "_rare_more", more[2:] if any(more[2:]) else ())

    @property
    def cache_read(self) -> int:
        """What a token read from the cache costs, in femto-credits."""
        return self._input_kinds[0]

    @property
    def cache_write(self) -> int:
        """What a token written to the cache costs, in femto-credits."""
        return self._input_kinds[1]

    def femto(self, metered: Metered) -> int:
        """The exact cost of the tokens in femto-credits."""
        # The sum over all kinds, but that those which cost no more than others are not told apart: nearly all requests
        # are four products, a third of the work.
        femto = (
            metered.input * self.input_femto
            + metered.output * self.output_femto
            + metered.cache_read * self._cache_read_more
            + metered.cache_write * self._cache_write_more
        )
        if not self._rare_more:
            return femto
        audio_input, image_input, audio_output, image_output, reasoning = self._rare_more
        return (
            femto
            + metered.audio_input * audio_input
            + metered.image_input * image_input
            + metered.audio_output * audio_output
            + metered.image_output * image_output
            + metered.reasoning * reasoning
        )

    def figures(self) -> list[str]:
        """All that is charged, whether it was written or not: equal for equal prices."""
        usual = (self.input_femto, self.output_femto, *self._input_kinds[:2])
        others = (*self._input_kinds[2:], *self._output_kinds)
        # What has no price of its own is left out: a version of four prices is older than all the others.
        plain = (*[self.input_femto] * 2, *[self.output_femto] * 3)
        return [*map(str, usual), *([repr(others)] if others != plain else [])]

    def dearest_input_femto(self) -> int:
        """The most that one input token can cost, whichever kind the upstream will say it was."""
        return max(self.input_femto, *self._input_kinds)

    def dearest_output_femto(self) -> int:
        """The most that one output token can cost."""
        return max(self.output_femto, *self._output_kinds)


@value(frozen=True, slots=True)
class Tier:
    """What tokens cost in a request of more than above_input_tokens: all of its tokens, not only those above."""

    above_input_tokens: int
    tokens: TokenPrices


@value(frozen=True, slots=True)
class Prices:
    """List prices of one model, in femto-credits, each ≥ 0.

    None, and no images: it does not sell that, which is something else than to sell it for nothing; what is used of it
    all the same costs nothing. tiers: at most MAX_TIERS, by above_input_tokens, upwards. images: by (size, quality),
    either of which may be ANY; the closest match counts, a size before a quality, and where none matches the dearest
    that could be meant. audio_ms_femto: per millisecond of audio.
    """

    tokens: TokenPrices | None = None
    tiers: tuple[Tier, ...] = ()
    request_femto: int | None = None
    audio_ms_femto: int | None = None
    character_femto: int | None = None
    images: Mapping[tuple[str, str], int] = field(default_factory=lambda: MappingProxyType({}))
    # By reach, downwards: the dearest input token and output token of a request with more input than that.
    _dearest: tuple[tuple[int, tuple[int, int]], ...] = field(init=False, repr=False, compare=False)
    sells_units: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reach: list[tuple[int, tuple[int, int]]] = []
        dearest_input = dearest_output = 0
        for above, tokens in ((-1, self.tokens), *((tier.above_input_tokens, tier.tokens) for tier in self.tiers)):
            if tokens is not None:
                dearest_input = max(dearest_input, tokens.dearest_input_femto())
                dearest_output = max(dearest_output, tokens.dearest_output_femto())
            reach.insert(0, (above, (dearest_input, dearest_output)))
        object.__setattr__(self, "_dearest", tuple(reach))
        units = self.request_femto or self.audio_ms_femto or self.character_femto or self.images
        object.__setattr__(self, "sells_units", bool(units))

    def figures(self) -> list[str]:
        """All that is charged, whether it was written or not: equal for equal prices."""
        tiers = [(tier.above_input_tokens, tier.tokens.figures()) for tier in self.tiers]
        counted = (self.request_femto, self.audio_ms_femto, self.character_femto)
        units = (*(_or(price, 0) for price in counted), sorted(self.images.items()))
        tokens = self.tokens.figures() if self.tokens else []
        return [*tokens, *([repr(tiers)] if tiers else []), *([repr(units)] if any(units) else [])]

    def femto(self, metered: Metered) -> int:
        """The exact cost in femto-credits."""
        tokens = self._tokens_at(metered.input) if self.tiers else self.tokens
        femto = 0 if tokens is None else tokens.femto(metered)
        return femto + self.units_femto(metered) if self.sells_units else femto

    def units_femto(self, metered: Metered) -> int:
        """The part of the cost that is not tokens."""
        return (
            metered.requests * _or(self.request_femto, 0)
            + metered.audio_ms * _or(self.audio_ms_femto, 0)
            + metered.characters * _or(self.character_femto, 0)
            + sum(images.count * self.image_femto(images.size, images.quality) for images in metered.images)
        )

    def cost(self, metered: Metered, rate_ppm: int) -> Cost:
        """The cost to an account whose plan pays rate_ppm of the list price."""
        return cost_of(self.femto(metered), rate_ppm)

    def most_femto(self, metered: Metered) -> int:
        """The most that a use up to metered can cost: each token of the dearest kind, at the dearest tier in reach."""
        return self.most_of(metered.input, metered.output, metered)

    def most_of(self, input_tokens: int, output_tokens: int, units: Metered) -> int:
        """The same of so many tokens, and of what in units is not tokens."""
        dearest_input, dearest_output = self.dearest_femto(input_tokens)
        femto = input_tokens * dearest_input + output_tokens * dearest_output
        return femto + self.units_femto(units) if self.sells_units else femto

    def dearest_femto(self, input_tokens: int) -> tuple[int, int]:
        """The most that a token of the input, and one of the output, can cost in a request of up to input_tokens."""
        for above, dearest in self._dearest:
            if input_tokens > above:
                return dearest
        raise AssertionError("no count of tokens is below 0")

    def image_femto(self, size: str, quality: str) -> int:
        """What one image costs; 0 where images are not sold. Either may be AUTO, or have no price of its own."""
        if not self.images:
            return 0
        key = self._image_key(size, quality) or self._image_key(*self.dearest_image(size, quality))
        assert key is not None, "the dearest kind is one that has a price"
        return self.images[key]

    def dearest_image(self, size: str, quality: str) -> tuple[str, str]:
        """The kind that costs most of those that may be meant, where AUTO may mean any; the dearest of all where none
        is. The kind itself where images are not sold."""
        kinds = [kind for kind in self._may_mean(size, quality) if self._image_key(*kind)]
        return max(kinds or self.images, key=lambda kind: self.image_femto(*kind), default=(size, quality))

    def sells_image(self, size: str, quality: str) -> bool:
        """Whether an image of the kind has a price. Either may be AUTO."""
        return any(self._image_key(*kind) for kind in self._may_mean(size, quality))

    def _may_mean(self, size: str, quality: str) -> Iterator[tuple[str, str]]:
        """All kinds that an upstream may choose, of which one stands for those that are not named."""
        sizes = {ANY, *(key[0] for key in self.images)} if size == AUTO else {size}
        qualities = {ANY, *(key[1] for key in self.images)} if quality == AUTO else {quality}
        return product(sorted(sizes), sorted(qualities))

    def _image_key(self, size: str, quality: str) -> tuple[str, str] | None:
        """The entry that counts for an image of the kind."""
        keys = ((size, quality), (size, ANY), (ANY, quality), (ANY, ANY))
        return next((key for key in keys if key in self.images), None)

    def _tokens_at(self, input_tokens: int) -> TokenPrices | None:
        for tier in reversed(self.tiers):
            if input_tokens > tier.above_input_tokens:
                return tier.tokens
        return self.tokens


def _or(femto: int | None, otherwise: int) -> int:
    return otherwise if femto is None else femto


def cost_of(femto: int, rate_ppm: int) -> Cost:
    """Round an exact cost up to nano-credits, at list price and at the plan's rate."""
    payg_nano = -(-femto // FEMTO_PER_NANO)
    return Cost(payg_nano, payg_nano if rate_ppm == FULL_RATE_PPM else -(-femto * rate_ppm // _FEMTO_PPM_PER_NANO))


def femto_per_unit(usd: Decimal) -> int:
    """The integer price of a decimal USD price per unit. Raises ValueError, the rest of a sentence, beyond 15
    decimals."""
    femto = usd * FEMTO_PER_CREDIT
    if femto != int(femto):
        raise ValueError("has more decimals than the gateway can charge exactly")
    return int(femto)


def usd_per_unit(femto: int) -> Decimal:
    """The decimal USD price per unit, as models lists show it."""
    return Decimal(femto) / FEMTO_PER_CREDIT
