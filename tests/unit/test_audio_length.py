"""How long a recording is held for, and charged for where nobody tells."""

import io
import struct
import wave

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apis.audio_length import LEAST_BYTES_PER_S, USUAL_BYTES_PER_S, likely_ms, most_ms
from gateway.apis.form import HEAD_BYTES


def recorded(seconds: float, rate: int, channels: int, width: int) -> bytes:
    """A WAV file as Python writes it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(bytes(round(seconds * rate) * channels * width))
    return file.getvalue()


def header(
    form: int = 1, channels: int = 1, rate: int = 16_000, block: int = 2, bits: int = 16, told: int = 1
) -> bytes:
    return struct.pack("<4sI8sIHHIIHH", b"RIFF", 9, b"WAVEfmt ", 16, form, channels, rate, told, block, bits)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 96_000])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (1, 2), (2, 2), (2, 3), (6, 4)])
def test_a_wav_file_of_samples_is_as_long_as_its_samples(rate: int, channels: int, width: int) -> None:
    file = recorded(1.25, rate, channels, width)
    assert likely_ms(file[:HEAD_BYTES], len(file)) == 1250
    assert most_ms(file[:HEAD_BYTES], len(file)) == 2000  # whole seconds


def test_an_extensible_wav_file_is_known_by_its_inner_format() -> None:
    for inner, known in ((1, True), (3, True), (0x55, False)):
        head = header(0xFFFE, told=32_000) + struct.pack("<HHIH", 22, 16, 4, inner) + bytes(14)
        assert most_ms(head, 32_000) == (1000 if known else 64_000)
    assert most_ms(header(0xFFFE), 32_000) == 64_000  # cut off


@pytest.mark.parametrize(
    "head",
    [b"", b"RIFF", header()[:35], b"OggS" + header()[4:], header(form=0x55), header(channels=0), header(block=0),
     header(rate=0), header(rate=1), header(bits=0), b"RIFX" + header()[4:]],
    ids=range(11),
)  # fmt: skip
def test_of_every_other_file_the_most_and_the_usual_are_assumed(head: bytes) -> None:
    assert most_ms(head, 10_000) == 20_000 == 10_000 * 1000 // LEAST_BYTES_PER_S
    assert likely_ms(head, 10_000) == 2500 == 10_000 * 1000 // USUAL_BYTES_PER_S


def test_a_header_that_contradicts_itself_is_read_as_the_longer_recording() -> None:
    assert most_ms(header(block=65_535), 32_000) == 1000
    assert most_ms(header(bits=65_535), 32_000) == 1000
    assert most_ms(header(channels=2), 32_000) == 1000


@given(st.binary(max_size=80), st.integers(0, 2**40))
def test_whatever_a_file_begins_with_it_has_a_length_that_is_no_less_than_likely(head: bytes, size: int) -> None:
    assert 0 <= likely_ms(head, size) <= most_ms(head, size)
    assert (most_ms(head, size) == 0) == (size == 0)
    assert most_ms(header()[:20] + head, size) <= -(-size // LEAST_BYTES_PER_S) * 1000
