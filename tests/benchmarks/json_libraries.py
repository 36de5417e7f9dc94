"""Which JSON library reads and writes a chat body fastest: ``python -m tests.benchmarks.json_libraries``.

Needs ``pip install msgspec`` beside the test extra. Prints the best of seven rounds, as times and as ratios to the
library that the gateway uses; the figures beside ``orjson`` in pyproject.toml come from here.
"""

import json
import random
import timeit
from collections.abc import Callable
from functools import partial

import msgspec
import orjson

BODY_BYTES = 365_000
ROUNDS, CALLS = 7, 50


def chat_body() -> bytes:
    """A chat request of BODY_BYTES with accents, quotes and line breaks in it."""
    pick = random.Random(1)
    words = ["alpha", "beta", "naïve", "gamma", '"q"', "delta\n"]
    messages: list[dict[str, str]] = []
    size = 0
    while size < BODY_BYTES:
        text = " ".join(pick.choice(words) for _ in range(300))
        messages.append({"role": "user", "content": text})
        size += len(orjson.dumps(messages[-1]))
    return orjson.dumps({"model": "m", "messages": messages, "stream": True, "max_tokens": 100})


def best_us(call: Callable[[], object]) -> float:
    """Microseconds of one call, in the best round."""
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    """Print the table."""
    body = chat_body()
    document = orjson.loads(body)
    libraries: dict[str, tuple[Callable[[bytes], object], Callable[[object], object]]] = {
        "orjson": (orjson.loads, orjson.dumps),
        "msgspec": (msgspec.json.Decoder().decode, msgspec.json.Encoder().encode),
        "json": (json.loads, lambda value: json.dumps(value).encode()),
    }
    figures = {
        name: (best_us(partial(read, body)), best_us(partial(write, document)))
        for name, (read, write) in libraries.items()
    }
    own = figures["orjson"]
    print(f"{len(body)} bytes        read µs (ratio)   write µs (ratio)")
    for name, (read_us, write_us) in figures.items():
        print(f"{name:12} {read_us:8.0f} ({read_us / own[0]:.2f})  {write_us:8.0f} ({write_us / own[1]:.2f})")


if __name__ == "__main__":
    main()
