"""What the demo model says, and how it counts.

A token is up to six letters or digits together with the space before them, or one other character. Hence a text
never has more tokens than UTF-8 bytes, and the tokens of an answer joined are the answer.
"""

import re
from dataclasses import dataclass

LABEL = "This is the demo model of the quota gateway, not a language model."

#: Slow enough to be seen arriving, fast enough not to be waited for.
TOKEN_SECONDS = 0.01

_ECHO_CHARACTERS = 60
_TOKEN = re.compile(r" ?\w{1,6}|\W")
_REMARKS = (
    "The gateway held credits before it passed the request on, and charges what these tokens cost.",
    "Configure an upstream and its key to get answers from a real model.",
    "The same question always gets the same answer.",
    "Set {limit} to get a shorter one.",
    "Set stream to true to see it arrive token by token.",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: what the answer echoes. tokens: what the whole prompt counts."""

    text: str
    tokens: int


def split_tokens(text: str) -> list[str]:
    """The tokens of text, which joined are text: at most one per UTF-8 byte."""
    return _TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """How many tokens text has."""
    return _TOKEN.subn("", text)[1]  # without a list of them all: a body may be large


def words(asked: str, nth: int = 0, *, limit: str = "max_tokens") -> str:
    """Label, echo and one to five remarks, by the length of what was asked; nth turns the remarks round.

    limit: what the API calls the field that makes an answer shorter.
    """
    echo = " ".join(asked.split(maxsplit=_ECHO_CHARACTERS))
    if len(echo) > _ECHO_CHARACTERS:
        echo = echo[:_ECHO_CHARACTERS] + "…"
    count = 1 + count_tokens(asked) % len(_REMARKS)
    remarks = [_REMARKS[(nth + offset) % len(_REMARKS)].format(limit=limit) for offset in range(count)]
    return " ".join([LABEL, f'You wrote: "{echo}".', *remarks])
