"""What every program here prints: one line of JSON per thing that it was told to do."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Saw = dict[str, Any]


def main(doing: Mapping[str, Callable[[Saw], None]]) -> None:
    """Do what the command line says, one after another, each by its name in doing.

    Each gets a dictionary that it fills with what it sees: text, finish, chunks, usage (input, of it cached, output)
    and cost. What it raises is part of that.
    """
    for name in sys.argv[1:]:
        saw: Saw = {"text": "", "finish": None, "chunks": 0, "usage": None, "cost": None, "error": None}
        try:
            doing[name](saw)
        except Exception as error:
            saw["error"] = _described(error)
        print(json.dumps(saw, default=str), flush=True)


def usage_of(input_tokens: int, output_tokens: int, cached_tokens: int | None = 0) -> dict[str, int]:
    """Tokens of a request: input_tokens includes cached_tokens."""
    return {"input": input_tokens, "output": output_tokens, "cached": cached_tokens or 0}


@contextmanager
def short_naps(seconds: float) -> Iterator[list[float]]:
    """Let no wait take longer than seconds, and say how long each was meant to be."""
    import time

    meant: list[float] = []
    sleep = time.sleep

    def nap(wanted: float) -> None:
        meant.append(wanted)
        sleep(min(wanted, seconds))

    time.sleep = nap
    try:
        yield meant
    finally:
        time.sleep = sleep


def _described(error: Exception) -> Saw:
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    return {
        "class": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "code": inner.get("code"),
        "type": inner.get("type"),
        "metadata": inner.get("metadata"),
        "message": str(error),
    }
