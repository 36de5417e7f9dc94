"""Usage and answers of OpenAI's completions: ``prompt_tokens``, ``completion_tokens`` and their ``total_tokens``.

Where figures disagree: a count that is there is believed before the total; one that is left out (or null) is what the
other leaves of the total. Some vendors count reasoning beside the completion and not in it, which only the total tells:
where it is the sum of all three, the output is the sum of both. A part that is more than its whole is cut when it is
billed. Of the reports in one stream the latest counts, be it on the chunk with the finish or on one of its own behind
it; with ``n`` > 1 those that have a chunk of their own are added up.
"""

from typing import Any

from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.figures import Usage, count, detail, either
from gateway.upstream.usage.shown import answer_of, as_text, document_of

# Fields of a choice that name the stop that matched (vLLM, SGLang): which one it was may be all that a client asks.
_STOPS = ("stop_reason", "matched_stop")
# Fields of a choice that tell of its tokens, whether they have a text or not.
_TOKENS = ("logprobs", "token_ids")
_SIGNS = frozenset({*_STOPS, *_TOKENS, "prompt_logprobs"})
_DETAILS = frozenset({"prompt_tokens_details", "completion_tokens_details"})


def read_usage(usage: object) -> Usage | None:
    """The ``usage`` object of completions; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    total = count(usage, "total_tokens")
    given = either(usage, "prompt_tokens", total, count(usage, "completion_tokens"))
    made = either(usage, "completion_tokens", total, given)
    if given is None or made is None or not (given or made):
        return None
    if _DETAILS.isdisjoint(usage):
        return Usage(given, made)
    reasoning = detail(usage, "completion_tokens_details", "reasoning_tokens")
    if total == given + made + reasoning:
        made += reasoning
    return Usage(
        given,
        made,
        cache_read_tokens=detail(usage, "prompt_tokens_details", "cached_tokens"),
        cache_write_tokens=detail(usage, "prompt_tokens_details", "cache_write_tokens"),
        reasoning_tokens=reasoning,
        audio_input_tokens=detail(usage, "prompt_tokens_details", "audio_tokens"),
        audio_output_tokens=detail(usage, "completion_tokens_details", "audio_tokens"),
        image_input_tokens=detail(usage, "prompt_tokens_details", "image_tokens"),
        image_output_tokens=detail(usage, "completion_tokens_details", "image_tokens"),
    )


def read_choices(body: bytes) -> Answer | None:
    """A whole answer of the completions endpoints; None where it is not a JSON object, or an error."""
    document = document_of(body)
    if document is None:
        return None
    found = document.get("choices")
    choices = [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []
    return answer_of(
        [text for choice in choices for text in _texts_of(choice)],
        read_usage(document.get("usage")),
        sum(_signs_in(said) for said in (document, *choices)),
    )


def _texts_of(choice: dict[str, Any]) -> list[str]:
    """What there is to read in a choice."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return [text] if isinstance(text := choice.get("text"), str) and text else []
    # Some servers send reasoning under both of its names.
    twice = "reasoning_content" if message.get("reasoning") else ""
    return [as_text(part) for name, part in message.items() if part and name not in ("role", twice)]


def _signs_in(said: dict[str, Any]) -> int:
    """Of how many tokens an answer or a choice tells otherwise than by its text."""
    if _SIGNS.isdisjoint(said):
        return 0
    stops = any(type(stop := said.get(name)) is int or (isinstance(stop, str) and stop) for name in _STOPS)
    # Those of the prompt are no output, but something to pay for.
    least = int(stops or bool(said.get("prompt_logprobs")))
    return max(least, *(_length_of(said.get(name)) for name in _TOKENS))


def _length_of(tokens: object) -> int:
    """Of how many tokens a field tells that holds a list of them, or several lists of as many."""
    if isinstance(tokens, dict):
        return max((len(value) for value in tokens.values() if isinstance(value, (list, dict))), default=0)
    return len(tokens) if isinstance(tokens, list) else 0
