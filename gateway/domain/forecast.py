"""How long a stream will probably be: what it holds first, before it has shown any of its output."""

from collections import deque

#: Until this many streams of a model have finished, nothing is known of it.
LEAST_SAMPLES = 20
#: What is expected of a model that nothing is known of, in tokens per answer.
UNKNOWN_TOKENS = 256
#: Less is never expected: an extension costs a call to the store.
LEAST_TOKENS = 64

_SAMPLES = 300
_QUANTILE_PERCENT = 99


class OutputForecast:
    """The lengths of each model's last finished answers, a few hundred at most.

    Lengths are tokens per answer, counted as streams of that model are counted while they run.
    """

    def __init__(self) -> None:
        self._lengths: dict[str, deque[int]] = {}
        self._expected: dict[str, int] = {}

    def add(self, model: str, tokens: int) -> None:
        """Learn from an answer of this model that came to its end, or to the end of the credits: long ones do."""
        self._lengths.setdefault(model, deque(maxlen=_SAMPLES)).append(tokens)
        self._expected.pop(model, None)

    def expected(self, model: str, most: int) -> int:
        """A length that few answers exceed: at least LEAST_TOKENS, and never more than most, the request's limit."""
        if model not in self._expected:
            self._expected[model] = self._quantile(model)
        return min(max(self._expected[model], LEAST_TOKENS), most)

    def _quantile(self, model: str) -> int:
        lengths = sorted(self._lengths.get(model, ()))
        if len(lengths) < LEAST_SAMPLES:
            return UNKNOWN_TOKENS
        return lengths[len(lengths) * _QUANTILE_PERCENT // 100]
