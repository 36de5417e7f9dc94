"""How long the audio in a file is, as far as its size and its beginning tell."""

import struct

#: Speech codecs take at least 4 kbit/s: no file of speech is longer than its bytes at that rate.
LEAST_BYTES_PER_S = 500
#: Compressed speech usually takes 32 kbit/s. Only used to charge audio whose length no upstream told.
USUAL_BYTES_PER_S = 4000

_PCM_FORMATS = (0x0001, 0x0003, 0x0006, 0x0007)  # integers, floats, A-law, µ-law
_EXTENSIBLE = 0xFFFE


def most_ms(head: bytes, size_bytes: int) -> int:
    """The most milliseconds that a file of this size and beginning can hold: whole seconds, as many upstreams bill."""
    return -(-_ms(size_bytes, _pcm_bytes_per_s(head) or LEAST_BYTES_PER_S) // 1000) * 1000


def likely_ms(head: bytes, size_bytes: int) -> int:
    """The milliseconds that it probably holds."""
    rate = _pcm_bytes_per_s(head)
    if rate is None:
        return _ms(size_bytes, USUAL_BYTES_PER_S)
    begin = head.find(b"data", 36) + 8  # where the samples are
    return _ms(max(0, size_bytes - begin) if begin > 36 else size_bytes, rate)


def is_exact(head: bytes) -> bool:
    """Whether likely_ms is the length itself."""
    return _pcm_bytes_per_s(head) is not None


def _ms(size_bytes: int, bytes_per_s: int) -> int:
    return -(-size_bytes * 1000 // bytes_per_s)


def _pcm_bytes_per_s(head: bytes) -> int | None:
    """The rate of a WAV file whose samples all take the same room; None for every other file.

    It is reckoned from what players go by: the figure that the file itself gives for it is not looked at.
    """
    if head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt " or len(head) < 36:
        return None
    form, channels, samples_per_s, _, block_bytes, sample_bits = struct.unpack_from("<HHIIHH", head, 20)
    if form == _EXTENSIBLE and len(head) >= 46:
        form = struct.unpack_from("<H", head, 44)[0]
    if form not in _PCM_FORMATS:
        return None
    # Some players go by the one figure and some by the other: what both allow is the most that it can be.
    rate = samples_per_s * min(block_bytes, channels * -(-sample_bits // 8))
    return rate if rate >= LEAST_BYTES_PER_S else None
