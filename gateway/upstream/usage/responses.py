"""Usage of OpenAI's Responses API: ``input_tokens``, ``output_tokens`` and their details.

Where figures disagree: ``total_tokens`` is not looked at, and without both counts there is no usage. A part that is
more than its whole is cut when it is billed. In a stream only the last event's usage counts.
"""

from gateway.upstream.usage.figures import Usage, count, details, part


def read_response_usage(usage: object) -> Usage | None:
    """The ``usage`` object of a response; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given, made = count(usage, "input_tokens"), count(usage, "output_tokens")
    if given is None or made is None or not (given or made):
        return None
    inputs, outputs = details(usage, "input_tokens_details"), details(usage, "output_tokens_details")
    return Usage(
        given,
        made,
        cache_read_tokens=part(inputs, "cached_tokens"),
        cache_write_tokens=part(inputs, "cache_write_tokens"),
        reasoning_tokens=part(outputs, "reasoning_tokens"),
        audio_input_tokens=part(inputs, "audio_tokens"),
        audio_output_tokens=part(outputs, "audio_tokens"),
        image_input_tokens=part(inputs, "image_tokens"),
        image_output_tokens=part(outputs, "image_tokens"),
    )
