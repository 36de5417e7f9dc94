"""What a request used, as most of these tests say it."""

from gateway.domain.metered import Metered


def used(
    input_tokens: int = 0, output: int = 0, cache_read: int = 0, cache_write: int = 0, *, reasoning: int = 0
) -> Metered:
    """One request's tokens."""
    return Metered(input_tokens, output, cache_read, cache_write, reasoning=reasoning, requests=1)
