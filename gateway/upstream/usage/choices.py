"""Usage and answers of OpenAI's completions: ``prompt_tokens``, ``completion_tokens`` and their ``total_tokens``.

Where figures disagree: a count that is there is believed before the total; one that is left out (or null) is what the
other leaves of the total. Some vendors count reasoning beside the completion and not in it, which only the total tells:
where it is the sum of all three, the output is the sum of both. A part that is more than its whole is cut when it is
billed. Of the reports in one stream the latest counts, be it on the chunk with the finish or on one of its own behind
it; with ``n`` > 1 those that have a chunk of their own are added up.
"""

from typing import Any

from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.figures import MOST_TOKENS, Usage, count, details, either, part
from gateway.upstream.usage.shown import answer_of, as_text, bytes_of, document_of

_PLAIN_MEMBERS = frozenset({"role", "content"})
# Fields of a choice that name the stop that matched (vLLM, SGLang): which one it was may be all that a client asks.
_NO_STOPS = (None, None)
_SIGNS = frozenset({"logprobs", "token_ids", "prompt_logprobs", "stop_reason", "matched_stop"})


def read_usage(usage: object) -> Usage | None:
    """The ``usage`` object of completions; None where it is missing or makes no sense."""
    if not isinstance(usage, dict):
        return None
    given, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    inputs, outputs = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    # As plain as many are: half the work.
    if (
        not (inputs or outputs)
        and (type(given) is int and 0 < given <= MOST_TOKENS)
        and (type(made) is int and 0 <= made <= MOST_TOKENS)
    ):
        return Usage(given, made)
    return _read_in_full(usage)


def _read_in_full(usage: dict[str, Any]) -> Usage | None:
    given, made = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    if given is None or made is None:
        total = count(usage, "total_tokens")
        given = either(usage, "prompt_tokens", total, made)
        made = either(usage, "completion_tokens", total, given)
        if given is None or made is None:
            return None
    if not (given or made):
        return None
    inputs, outputs = details(usage, "prompt_tokens_details"), details(usage, "completion_tokens_details")
    if not (inputs or outputs):
        return Usage(given, made)
    reasoning = part(outputs, "reasoning_tokens")
    if reasoning and count(usage, "total_tokens") == given + made + reasoning:
        made += reasoning
    return Usage(
        given,
        made,
        cache_read_tokens=part(inputs, "cached_tokens"),
        cache_write_tokens=part(inputs, "cache_write_tokens"),
        reasoning_tokens=reasoning,
        audio_input_tokens=part(inputs, "audio_tokens"),
        audio_output_tokens=part(outputs, "audio_tokens"),
        image_input_tokens=part(inputs, "image_tokens"),
        image_output_tokens=part(outputs, "image_tokens"),
    )


def read_choices(body: bytes) -> Answer | None:
    """A whole answer of the completions endpoints; None where it is not a JSON object, or an error."""
    document = document_of(body)
    if document is None:
        return None
    found, usage = document.get("choices"), read_usage(document.get("usage"))
    if _SIGNS.isdisjoint(document) and (text := _only_text(found)) is not None:
        return Answer(usage, len(text) if text.isascii() else bytes_of(text), len(text))
    texts, signs = [], _signs_in(document)
    for choice in found if isinstance(found, list) else ():
        if isinstance(choice, dict):
            texts += _texts_of(choice)
            signs += _signs_in(choice)
    return answer_of(texts, usage, signs)


def _only_text(found: Any) -> str | None:
    """The text of an only choice, if there is nothing else to read or to count, as in most: a third of the work."""
    if type(found) is not list or len(found) != 1 or type(choice := found[0]) is not dict:
        return None
    message = choice.get("message")
    if type(message) is not dict or type(text := message.get("content")) is not str:
        return None
    for name, said in message.items():
        if said and name not in _PLAIN_MEMBERS:
            return None
    for name, said in choice.items():
        if said is not None and name in _SIGNS:
            return None
    return text


def _texts_of(choice: dict[str, Any]) -> list[str]:
    """What there is to read in a choice."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return [text] if isinstance(text := choice.get("text"), str) and text else []
    # Some servers send reasoning under both of its names.
    unread = ("role", "reasoning_content") if message.get("reasoning") else ("role",)
    return [
        said if type(said) is str else as_text(said) for name, said in message.items() if said and name not in unread
    ]


def _signs_in(said: dict[str, Any]) -> int:
    """Of how many tokens an answer or a choice tells otherwise than by its text."""
    if _SIGNS.isdisjoint(said):
        return 0
    logprobs, ids, of_prompt = said.get("logprobs"), said.get("token_ids"), said.get("prompt_logprobs")
    stops = said.get("stop_reason"), said.get("matched_stop")
    if not (logprobs or ids or of_prompt) and stops == _NO_STOPS:  # as in nearly all, some of them null
        return 0
    # Those of the prompt are no output, but something to pay for.
    least = int(bool(of_prompt) or any(type(stop) is int or (isinstance(stop, str) and stop) for stop in stops))
    return max(least, _length_of(logprobs), _length_of(ids))


def _length_of(tokens: object) -> int:
    """Of how many tokens a field tells that holds a list of them, or several lists of as many."""
    if isinstance(tokens, dict):
        return max((len(value) for value in tokens.values() if isinstance(value, (list, dict))), default=0)
    return len(tokens) if isinstance(tokens, list) else 0
