"""How the prices of models.yaml are written and read: held exactly, and refused where they look like a mistake.

The readers are like those of fields.py.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

from pydantic import PlainValidator, ValidationInfo, WithJsonSchema
from pydantic.config import JsonDict

from gateway.config.document import Text, quoted
from gateway.config.fields import PriceUnit, context_of, number_schema, scalar
from gateway.domain.price import ANY, femto_per_unit

#: No token or character is cheaper or dearer than this (USD per million), but a mistaken unit is off by a million.
LEAST_PRICE = Decimal("0.001")
MOST_PRICE = Decimal(2000)

_PRICE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,18})?([eE][-+]?[0-9]{1,2})?")
# A size alone stands for any quality: written with a *, one image could have two prices.
_IMAGE = re.compile(r"(\*|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})(?:/([a-z0-9][a-z0-9_-]{0,31}))?")


def price_femto(value: object, info: ValidationInfo, thing: str = "token") -> int:
    """Femto-credits per thing of a price in the file's unit; 0 where the unit is unknown."""
    figure = _figure(scalar(value))
    unit = context_of(info).price_unit
    if unit is None:
        return 0
    each = figure.scaleb(-6) if unit == "usd_per_million_tokens" else figure
    _check_plausible(figure, unit, each, thing)
    return _exact(each, f"15 per {thing}, 9 per million")


def _figure(text: Text) -> Decimal:
    if not _PRICE.fullmatch(text.text):
        raise ValueError(f"must be a price in USD such as 0.638, not {quoted(text.written)}")
    return Decimal(text.text)


def _check_plausible(figure: Decimal, unit: PriceUnit, each: Decimal, thing: str) -> None:
    if _plausible(each):
        return
    both = f"is {plain(each)} USD per {thing}, which is {plain(each.scaleb(6))} USD per million {thing}s"
    if unit == "usd_per_million_tokens" and _plausible(figure):
        raise ValueError(f"{both}: did you mean price_unit: usd_per_token?")
    if unit == "usd_per_token" and _plausible(figure.scaleb(-6)):
        raise ValueError(f"{both}: did you mean price_unit: usd_per_million_tokens?")
    raise ValueError(f"{both}: a price is 0 or from {LEAST_PRICE} to {MOST_PRICE} USD per million {thing}s")


def _plausible(each: Decimal) -> bool:
    return not each or LEAST_PRICE <= each.scaleb(6) <= MOST_PRICE


def _exact(usd: Decimal, decimals: str) -> int:
    try:
        return femto_per_unit(usd)
    except ValueError as error:
        raise ValueError(f"{error} ({decimals})") from None


def plain(number: Decimal) -> str:
    """A decimal without exponent and without trailing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, slots=True)
class PlainPrice:
    """A price in USD, whatever the file's unit is. least, most: what is plausible, beside 0. parts: into how many a
    thing is divided to be counted, a power of ten."""

    thing: str
    least: Decimal
    most: Decimal
    parts: int = 1

    def femto(self, value: object) -> int:
        """Femto-credits per part."""
        usd = _figure(scalar(value))
        if usd and not self.least <= usd <= self.most:
            raise ValueError(
                f"is {plain(usd)} USD per {self.thing}: a price is 0 or from {plain(self.least)} to {plain(self.most)} "
                f"USD per {self.thing}"
            )
        zeros = len(str(self.parts)) - 1
        return _exact(usd.scaleb(-zeros), f"{15 - zeros} per {self.thing}")


REQUEST = PlainPrice("request", Decimal("1e-7"), Decimal(100))
SECOND = PlainPrice("second", Decimal("1e-7"), Decimal(1), parts=1000)
IMAGE = PlainPrice("image", Decimal("0.0001"), Decimal(100))


def image_kind(key: str) -> tuple[str, str]:
    """The size and the quality that a key of image_prices stands for, either of which may be ANY."""
    match = _IMAGE.fullmatch(key)
    if not match:
        raise ValueError(
            "is no kind of image: write a size (1024x1024), a size and a quality (1024x1024/high), a quality of any "
            'size ("*/high"), or "*" for every other image'
        )
    return match[1], match[2] or ANY


#: What the schema says of image_prices' keys: pydantic would describe them, but forbid no others.
IMAGE_KEYS: JsonDict = {"propertyNames": {"pattern": f"^({_IMAGE.pattern})$"}}
_PRICE_SCHEMA = number_schema(rf"^{_PRICE.pattern}$", "number", minimum=0)

TokenFemto = Annotated[int, PlainValidator(price_femto), _PRICE_SCHEMA]
CharacterFemto = Annotated[
    int, PlainValidator(lambda value, info: price_femto(value, info, "character")), _PRICE_SCHEMA
]
RequestFemto = Annotated[int, PlainValidator(REQUEST.femto), _PRICE_SCHEMA]
SecondFemto = Annotated[int, PlainValidator(SECOND.femto), _PRICE_SCHEMA]
ImageFemto = Annotated[int, PlainValidator(IMAGE.femto), _PRICE_SCHEMA]
ImageKind = Annotated[tuple[str, str], PlainValidator(image_kind), WithJsonSchema({"type": "string"})]
