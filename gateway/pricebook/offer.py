"""What a source says of a model: figures by the places of models.yaml, checked one by one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal

from gateway.config.fields import MOST_TOKENS, PriceUnit
from gateway.config.prices import IMAGE, LEAST_PRICE, MOST_PRICE, REQUEST, SECOND, PlainPrice, image_kind, plain
from gateway.config.raw import TOKEN_PRICES
from gateway.domain.price import MAX_TIERS, femto_per_unit

#: Where a figure stands in a model: (field,), ("image_prices", kind) or ("tiers", above_input_tokens, field).
Place = tuple[str | int, ...]

#: The fields that an import may write, in the order in which they are put.
FIELDS = (
    *TOKEN_PRICES,
    "tiers",
    "request_price",
    "second_price",
    "character_price",
    "image_prices",
    "context_window",
    "max_output_tokens",
)
INPUT, OUTPUT = "input_token_price", "output_token_price"
#: A price of a part, and the price that the part has without one of its own.
PARTS = {
    **dict.fromkeys(
        ("cache_read_token_price", "cache_write_token_price", "audio_input_token_price", "image_input_token_price"),
        INPUT,
    ),
    **dict.fromkeys(("audio_output_token_price", "image_output_token_price", "reasoning_token_price"), OUTPUT),
}
SIZES: tuple[Place, ...] = (("context_window",), ("max_output_tokens",))
#: What a model can be sold by. A source often says the same price in several ways, of which one may be charged.
WAYS = ("tokens", "image_prices", "second_price", "character_price")
_PLAIN: Mapping[str, PlainPrice] = {"request_price": REQUEST, "second_price": SECOND, "image_prices": IMAGE}
_MOST_DIGITS = 25


class Refused(ValueError):
    """Why a model's figures must not be taken over; the rest of a sentence that begins with the model's name."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model's figures: prices in USD per token, character, request, second or image; sizes in tokens.

    window_at_least: the source names the longest input, so the context window may be larger. no_output: it is of a kind
    that bills none. notes: what the source says besides, and this file cannot say.
    """

    figures: Mapping[Place, Decimal]
    notes: tuple[str, ...] = ()
    window_at_least: bool = False
    no_output: bool = False


def number(text: str) -> Decimal:
    """A number of JSON, exactly. Raises ValueError for one that is no figure of money or size."""
    figure = Decimal(text)
    if len(figure.as_tuple().digits) > _MOST_DIGITS or (figure and abs(figure.adjusted()) > _MOST_DIGITS):
        raise ValueError(f"{text[:40]} has more digits than any price")
    return figure


def name_of(place: Place) -> str:
    """A place as people read it, such as ``image_prices 1024x1024``."""
    if place[0] == "tiers":
        return f"{place[2]} above {place[1]} tokens"
    return " ".join(str(part) for part in place)


def way_of(place: Place) -> str:
    """What the figure sells by: one of WAYS, or request_price, which stands beside any."""
    field = str(place[0])
    return "tokens" if field in TOKEN_PRICES or field == "tiers" or place in SIZES else field


def in_file(place: Place, figure: Decimal, unit: PriceUnit) -> str:
    """A figure as models.yaml writes it: a plain decimal in its unit."""
    return plain(figure.scaleb(6) if _in_unit(place) and unit == "usd_per_million_tokens" else figure)


def from_file(place: Place, text: str, unit: PriceUnit) -> Decimal:
    """The opposite: what the text of a sound file says."""
    figure = Decimal(text)
    return figure.scaleb(-6) if _in_unit(place) and unit == "usd_per_million_tokens" else figure


def _in_unit(place: Place) -> bool:
    return str(place[-1]).endswith("_token_price") or place[0] == "character_price"


def check(figures: Mapping[Place, Decimal]) -> None:
    """Raises Refused for figures that the gateway cannot charge, or that look like those of another unit."""
    for place, figure in figures.items():
        try:
            _check_one(place, figure)
        except ValueError as error:
            raise Refused(f"{name_of(place)} {error}") from None
    thresholds = {place[1] for place in figures if place[0] == "tiers"}
    if len(thresholds) > MAX_TIERS:
        raise Refused(f"has {len(thresholds)} tiers by length: at most {MAX_TIERS} can be kept")
    window, most = (figures.get(size) for size in SIZES)
    if window is not None and most is not None and most > window:
        raise Refused(f"max_output_tokens is {most}, more than the context_window of {window}")


def _check_one(place: Place, figure: Decimal) -> None:
    field = str(place[0])
    if place in SIZES:
        _check_size(figure)
    elif field in _PLAIN:
        if field == "image_prices":
            image_kind(str(place[1]))
        _PLAIN[field].femto(f"{figure:f}")
    else:
        if field == "tiers":
            _check_size(Decimal(place[1]))
        _check_token_price(figure, "character" if field == "character_price" else "token")


def _check_size(figure: Decimal) -> None:
    if figure != int(figure) or not 1 <= figure <= MOST_TOKENS:
        raise ValueError(f"is {plain(figure)}, not a whole number from 1 to {MOST_TOKENS}")


def _check_token_price(usd: Decimal, thing: str) -> None:
    million = usd.scaleb(6)
    if usd and not LEAST_PRICE <= million <= MOST_PRICE:
        raise ValueError(
            f"is {plain(usd)} USD per {thing}, which is {plain(million)} per million: a price is 0 or from "
            f"{LEAST_PRICE} to {MOST_PRICE} USD per million {thing}s, so this one may be in another unit"
        )
    femto_per_unit(usd)


def without_empty_prices(offer: Offer) -> Offer:
    """Without prices of 0 that say that there is none: of a part beside a base price that is not 0, and of tokens where
    something else has a price."""
    figures = dict(offer.figures)
    notes = list(offer.notes)
    for place in list(figures):
        base = PARTS.get(str(place[-1]))
        if base and not figures[place] and (figures.get((*place[:-1], base)) or figures.get((base,))):
            notes.append(f"{name_of(place)} 0, beside {base}s that are not 0")
            del figures[place]
    others = [place for place in figures if way_of(place) != "tokens" and figures[place]]
    tokens = [place for place in figures if str(place[-1]).endswith("_token_price")]
    if others and not any(figures[place] for place in tokens):
        figures = {place: figure for place, figure in figures.items() if way_of(place) != "tokens"}
    return Offer(figures, tuple(notes), offer.window_at_least, offer.no_output)


def sold_by(offer: Offer, ways: Collection[str] | None) -> Offer:
    """The offer cut down to one way of selling, lest a use be charged twice.

    ways: those that the file has for the model, which it keeps; None for a model that is new, which gets the first of
    WAYS that is offered.
    """
    offered = [way for way in WAYS if any(way_of(place) == way for place in offer.figures if place not in SIZES)]
    kept = set(offered[:1] if ways is None else ways)
    if not offered or kept & set(offered):
        kept.add("request_price")
    figures, dropped = {}, []
    for place, figure in offer.figures.items():
        if way_of(place) in kept:
            figures[place] = figure
        elif place not in SIZES:
            dropped.append(f"{name_of(place)} {plain(figure)} USD, because the model is sold by {_ways(kept)}")
    return Offer(figures, (*offer.notes, *dropped), offer.window_at_least, offer.no_output)


def _ways(kept: Collection[str]) -> str:
    words = [way for way in WAYS if way in kept] or ["request_price"]
    return " and ".join(words)


def completed(offer: Offer) -> Offer:
    """A new model's offer with what models.yaml needs of it. Raises Refused where the source does not say enough."""
    figures, notes = dict(offer.figures), list(offer.notes)
    if not any(place not in SIZES for place in figures):
        raise Refused("has no price that the gateway could charge")
    if not any(way_of(place) == "tokens" and place not in SIZES for place in figures):
        return Offer({place: figure for place, figure in figures.items() if place not in SIZES}, offer.notes)
    dearest = max(
        (figures[(part,)] for part, base in PARTS.items() if base == OUTPUT and (part,) in figures), default=None
    )
    if (OUTPUT,) not in figures and (offer.no_output or dearest is not None):
        figures[OUTPUT,] = dearest or Decimal(0)
    if ("max_output_tokens",) not in figures and ("context_window",) in figures:
        figures["max_output_tokens",] = Decimal(1) if offer.no_output else figures["context_window",]
        if not offer.no_output:
            notes.append("max_output_tokens, which the source does not say: the context window is put")
    missing = [name_of(place) for place in ((INPUT,), (OUTPUT,), *SIZES) if place not in figures]
    if missing:
        raise Refused(f"cannot be added: the source does not say {' and '.join(missing)}")
    return Offer(figures, tuple(notes), offer.window_at_least, offer.no_output)
