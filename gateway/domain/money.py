"""Credits as integers.

One credit is one US dollar. Everything inside the gateway counts in nano-credits (1e-9 credit), because
a float cannot be trusted with a customer's last cent; decimals appear only at the edges.
"""

import re
from functools import lru_cache

NANO_PER_CREDIT = 1_000_000_000

#: The largest amount the engine touches (about 4.5 million credits). Lua keeps numbers as doubles, exact up
#: to 2**53; one bit less leaves room to add two of them.
MAX_NANO = 2**52 - 1

_DECIMAL = re.compile(r"[0-9]{1,7}(\.[0-9]{1,9})?")


class AmountError(ValueError):
    """The text is not an amount of credits that the gateway can hold exactly."""


def parse_credits(text: str) -> int:
    """Nano-credits in a plain decimal such as ``15`` or ``0.000000638``.

    Raises AmountError for signs, exponents, more than nine decimals, and anything above MAX_NANO.
    """
    if not _DECIMAL.fullmatch(text):
        raise AmountError(
            f"{text!r} is not an amount of credits: write a plain decimal with at most 9 decimals, such as 12.50"
        )
    whole, _, fraction = text.partition(".")
    nano = int(whole) * NANO_PER_CREDIT + int(fraction.ljust(9, "0"))
    if nano > MAX_NANO:
        raise AmountError(f"{text} credits is more than an account can hold ({format_credits(MAX_NANO)})")
    return nano


@lru_cache(maxsize=4096)  # the same amounts stand in headers and log, in this request and the next ones
def format_credits(nano: int) -> str:
    """The exact decimal of an amount in nano-credits, without exponent and without trailing zeros."""
    if nano < 0:
        return f"-{format_credits(-nano)}"
    digits = str(nano).zfill(10)  # cut as text: to divide and to pad the rest takes twice as long
    fraction = digits[-9:].rstrip("0")
    return f"{digits[:-9]}.{fraction}" if fraction else digits[:-9]
