"""Usage of OpenAI's Responses API: ``input_tokens``, ``output_tokens`` and their details.

Where figures disagree: ``total_tokens`` is not looked at, and without both counts there is no usage. A part that is
more than its whole is cut when it is billed. In a stream only the last event's usage counts.
"""

from gateway.upstream.usage.figures import Usage, count, detail


def read_response_usage(usage: object) -> Usage | None:
    """The ``usage`` object of a response; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if given is None or made is None or not (given or made):
        return None
    return Usage(
        given,
        made,
        cache_read_tokens=detail(usage, "input_tokens_details", "cached_tokens"),
        cache_write_tokens=detail(usage, "input_tokens_details", "cache_write_tokens"),
        reasoning_tokens=detail(usage, "output_tokens_details", "reasoning_tokens"),
        audio_input_tokens=detail(usage, "input_tokens_details", "audio_tokens"),
        audio_output_tokens=detail(usage, "output_tokens_details", "audio_tokens"),
        image_input_tokens=detail(usage, "input_tokens_details", "image_tokens"),
        image_output_tokens=detail(usage, "output_tokens_details", "image_tokens"),
    )
