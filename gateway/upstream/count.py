"""Output tokens of a stream, counted while it runs.

Upstreams tell the true number at the end, and until then a stream shows events and text. Each rule makes tokens of
them in its own way; which one fits depends on the upstream.
"""

from collections.abc import Sequence

import orjson

from gateway.config.model import CountOutput
from gateway.domain.request import BYTES_PER_TOKEN


class OutputCount:
    """Counts the texts that a stream's events hold.

    chunks: an event with output is a token, and so are every BYTES_PER_TOKEN bytes of text, whichever is more.
    bytes: every byte of text is a token; no tokenizer makes more of a text. usage: what the upstream reported last, and
    chunks for what came since. maximum: nothing waits for the count; it is as with chunks.
    """

    def __init__(self, rule: CountOutput) -> None:
        self._rule = rule
        self._by_bytes = rule == "bytes"
        self._bytes_each = 1 if self._by_bytes else BYTES_PER_TOKEN
        #: Events that held output.
        self.events = 0
        self._bytes = 0
        #: The tokens so far, by the rule.
        self.tokens = 0
        self._reported = 0
        self._events_then = 0
        self._bytes_then = 0

    @property
    def billable(self) -> int:
        """The tokens to charge where the upstream has not told all of them: never as many as bytes makes of them."""
        return self.tokens if self._rule == "usage" else max(self.events, -(-self._bytes // BYTES_PER_TOKEN))

    def tokens_with(self, texts: Sequence[bytes]) -> int:
        """The tokens if these texts, as they stand in JSON, came too."""
        return self._by_rule(self.events + len(texts), self._bytes + sum(map(size_of, texts)))

    def add(self, texts: Sequence[bytes]) -> None:
        """Count texts that are not empty, as they stand in JSON."""
        self.events += len(texts)
        self._bytes += sum(map(size_of, texts))
        self.tokens = self._by_rule(self.events, self._bytes)

    def took(self, texts: int, size_bytes: int, covered: int) -> bool:
        """Count so many texts of that size in all, unless that would make more tokens than are covered; whether they
        were counted."""
        events = self.events + texts
        size = self._bytes + size_bytes
        tokens = self._by_rule(events, size)
        if tokens > covered:
            return False
        self.events = events
        self._bytes = size
        self.tokens = tokens
        return True

    def report(self, output_tokens: int) -> None:
        """Take what the upstream says of all output up to now."""
        self._reported = output_tokens
        self._events_then, self._bytes_then = self.events, self._bytes
        self.tokens = self._by_rule(self.events, self._bytes)

    def _by_rule(self, events: int, size: int) -> int:
        by_size = -((self._bytes_then - size) // self._bytes_each)
        events -= self._events_then
        return self._reported + (by_size if by_size > events or self._by_bytes else events)


def size_of(text: bytes) -> int:
    """Bytes of a JSON string's text, once it is unescaped."""
    if b"\\" not in text:
        return len(text)
    try:
        return len(orjson.loads(b'"' + text + b'"').encode())
    except ValueError:  # half a character: as escaped it is longer at least
        return len(text)
