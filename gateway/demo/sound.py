"""A tone for each letter, as a WAV file or as plain samples: 24 kHz, 16 bits, one channel."""

import io
import math
import struct
import wave
from functools import cache

RATE = 24_000
SAMPLE_BYTES = 2
CHARACTER_MS = 60

_SAMPLES = RATE * CHARACTER_MS // 1000
_LOUDNESS = 6000
# Each divides _SAMPLES, so that a tone ends where it began and nothing clicks: from 300 to 667 Hz.
_PERIODS = (36, 40, 45, 48, 60, 72, 80)


def tone(text: str) -> bytes:
    """The samples: CHARACTER_MS for each character, silence for what is no letter or digit."""
    return b"".join(_tone_of(ord(character) % len(_PERIODS) if character.isalnum() else None) for character in text)


def wav_header(data_bytes: int) -> bytes:
    """What comes before so many bytes of samples."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * SAMPLE_BYTES, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    riff = struct.pack("<4sI4s", b"RIFF", 4 + len(form) + 8 + data_bytes, b"WAVE")
    return riff + form + struct.pack("<4sI", b"data", data_bytes)


def seconds_of(head: bytes, size: int, *, other_bytes_per_second: int) -> float:
    """How long a file of size bytes sounds, of which head is the beginning; other than WAV by a fixed rate."""
    try:
        with wave.open(io.BytesIO(head), "rb") as file:
            frame_bytes = file.getnchannels() * file.getsampwidth()
            # The header may promise more than is there: one written before its sound says "without end".
            return min(file.getnframes(), size // frame_bytes) / file.getframerate()
    except (wave.Error, EOFError, RuntimeError, ZeroDivisionError):  # RuntimeError: a chunk ends beyond the file
        return size / other_bytes_per_second


@cache
def _tone_of(which: int | None) -> bytes:
    if which is None:
        return bytes(_SAMPLES * SAMPLE_BYTES)
    step = 2 * math.pi / _PERIODS[which]
    return struct.pack(f"<{_SAMPLES}h", *(round(_LOUDNESS * math.sin(step * number)) for number in range(_SAMPLES)))
