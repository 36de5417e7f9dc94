"""How many tokens the audio of a realtime session comes to at most."""

#: Bytes per second of the format that a session has unless it asks for another: PCM, 16 bit, 24 kHz.
PCM_BYTES_PER_S = 48_000
_G711_BYTES_PER_S = 8_000
#: Of a format that the upstream chose and that is not known here, there are so few: each byte is much audio.
UNKNOWN_BYTES_PER_S = 1_000
#: Models make a token of 100 ms of what they hear, and of 50 ms of what they say. Twice as many are held for the first.
_TOKEN_MS = 50
_ESTIMATED_TOKEN_MS = 100

_FORMATS = {
    "pcm16": PCM_BYTES_PER_S,
    "audio/pcm": PCM_BYTES_PER_S,
    "g711_ulaw": _G711_BYTES_PER_S,
    "g711_alaw": _G711_BYTES_PER_S,
    "audio/pcmu": _G711_BYTES_PER_S,
    "audio/pcma": _G711_BYTES_PER_S,
}


def bytes_per_second(format_: object) -> int | None:
    """Of an audio format as sessions name it; None for an unknown one."""
    name, rate = (format_.get("type"), format_.get("rate")) if isinstance(format_, dict) else (format_, None)
    known = _FORMATS.get(name) if isinstance(name, str) else None
    if known != PCM_BYTES_PER_S or rate is None:
        return known
    return min(known, 2 * rate) if type(rate) is int and rate >= UNKNOWN_BYTES_PER_S else None


def decoded_bytes(base64: str) -> int:
    """The most bytes that base64 can stand for."""
    return -(-len(base64) * 3 // 4)


def duration_ms(size_bytes: int, rate: int) -> int:
    """The length of so many bytes at rate bytes per second, rounded up."""
    return -(-size_bytes * 1000 // rate)


def most_tokens(audio_ms: int) -> int:
    """The most tokens that audio of a length is for a model."""
    return -(-audio_ms // _TOKEN_MS)


def estimated_tokens(audio_ms: int) -> int:
    """The tokens that audio of a length is for a model that hears it."""
    return -(-audio_ms // _ESTIMATED_TOKEN_MS)
