"""What a request used, by everything that can have a price."""

from dataclasses import fields
from operator import attrgetter

from gateway.domain.value import value


@value(frozen=True, slots=True)
class Images:
    """Images that were made alike. size and quality: as the API writes them, ``1024x1024`` and ``high``."""

    size: str
    quality: str
    count: int


@value(frozen=True, slots=True)
class Metered:
    """What one request used, each figure ≥ 0.

    Tokens: cache_read, cache_write, audio_input and image_input are parts of input; audio_output, image_output and
    reasoning are parts of output. No token is in two parts. audio_ms: length of audio, milliseconds. characters: text
    to be spoken. requests: 1 where anything is charged.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    audio_input: int = 0
    image_input: int = 0
    audio_output: int = 0
    image_output: int = 0
    reasoning: int = 0
    images: tuple[Images, ...] = ()
    audio_ms: int = 0
    characters: int = 0
    requests: int = 0

    @property
    def plain_input(self) -> int:
        """Input tokens of no other kind."""
        return self.input - self.cache_read - self.cache_write - self.audio_input - self.image_input

    @property
    def plain_output(self) -> int:
        """Output tokens of no other kind."""
        return self.output - self.audio_output - self.image_output - self.reasoning

    @property
    def image_count(self) -> int:
        """Images in all."""
        return sum(images.count for images in self.images)

    @property
    def is_plain(self) -> bool:
        """Whether it is input and output and nothing else, as of most requests."""
        return bool(
            self.input
            and self.output
            and not (
                self.cache_read
                or self.cache_write
                or self.audio_input
                or self.image_input
                or self.audio_output
                or self.image_output
                or self.reasoning
                or self.images
                or self.audio_ms
                or self.characters
            )
        )

    def figures(self) -> dict[str, int]:
        """By kind, what is not zero; that it is one request goes without saying."""
        if self.is_plain:  # a fifth of the work
            return {"input": self.input, "output": self.output}
        figures = {name: count for name, count in zip(_COUNTS, _counts_of(self), strict=True) if count}
        return {**figures, "images": self.image_count} if self.images else figures


_COUNTS = tuple(field.name for field in fields(Metered) if field.name not in ("images", "requests"))
_counts_of = attrgetter(*_COUNTS)
