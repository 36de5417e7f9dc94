"""What a request asks of a model, read from its decoded JSON body, and the most that it can use.

Only fields whose meaning for the cost is known are let through: a field that an upstream understands and the
gateway does not (``n_predict`` beside ``max_tokens``, say) would be forwarded at one price and answered at another.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from gateway.domain.model import Model
from gateway.domain.price import Tokens

Operation = Literal["chat", "text_completion", "embeddings"]

MAX_COMPLETIONS = 128
MAX_PROMPTS = 2048
MAX_SCHEMA_DEPTH = 64

#: Less output than this is no answer: a request that cannot hold it (or what it asks for, if less) is refused.
MIN_OUTPUT_TOKENS = 16

#: English text runs at about four bytes per token. Only used to charge input and output for which no upstream
#: gave a usage, and never beyond the bound.
BYTES_PER_TOKEN = 4

#: No tokenizer averages more characters per token than this. Where a request has several prompts or answers, an
#: upstream that reports fewer tokens has reported only some of them.
MOST_CHARACTERS_PER_TOKEN = 8

# Any other key of a message or of a text part may be another kind of content to some upstream: then the text's
# bytes bound nothing, and the whole context window is held.
_MESSAGE_KEYS = frozenset(
    "role content name tool_calls tool_call_id function_call refusal reasoning_content reasoning".split()
)
_PART_KEYS = frozenset({"type", "text", "refusal"})
_TEMPLATE_ARGUMENTS = frozenset({"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort"})

_EVERYWHERE = frozenset({"model", "user", "metadata", "safety_identifier"})
_SAMPLING = frozenset(
    "temperature top_p top_k min_p typical_p top_a repetition_penalty presence_penalty frequency_penalty logit_bias "
    "seed stop stop_token_ids bad_words ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens "
    "logprobs top_logprobs prompt_logprobs response_format guided_json guided_regex guided_choice guided_grammar "
    "structured_outputs grammar json_schema stream stream_options max_tokens n cache_prompt samplers mirostat "
    "mirostat_tau mirostat_eta repeat_penalty repeat_last_n dry_multiplier dry_base dry_allowed_length "
    "dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold store prompt_cache_key "
    "prompt_cache_retention add_special_tokens return_tokens_as_token_ids include_stop_str_in_output".split()
)
_FIELDS: dict[Operation, frozenset[str]] = {
    "chat": _EVERYWHERE
    | _SAMPLING
    | frozenset(
        "messages max_completion_tokens tools tool_choice parallel_tool_calls functions function_call "
        "reasoning_effort verbosity chat_template_kwargs add_generation_prompt continue_final_message "
        "reasoning_format thinking_forced_open modalities service_tier include_reasoning".split()
    ),
    "text_completion": _EVERYWHERE | _SAMPLING | frozenset({"prompt", "suffix", "echo", "best_of"}),
    "embeddings": _EVERYWHERE | frozenset({"input", "dimensions", "encoding_format", "truncate_prompt_tokens"}),
}


class InvalidRequest(ValueError):
    """The body cannot be priced. param: the field that is at fault, or None for the body as a whole."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for.

    input_bytes: UTF-8 bytes of its JSON, an upper bound of its text's tokens; None where it holds something other
    than text. template_bytes: what a chat template may make more of it. prompts: how many inputs;
    least_input_tokens: what several cannot be less than. completions: answers per prompt. max_tokens: most output
    tokens per answer that the client named.
    """

    operation: Operation
    model: str
    input_bytes: int | None
    prompts: int = 1
    completions: int = 1
    template_bytes: int = 0
    least_input_tokens: int = 0
    max_tokens: int | None = None
    echo: bool = False
    stream: bool = False
    wants_usage: bool = False
    wants_running_usage: bool = False

    def of_size(self, size_bytes: int) -> "Ask":
        """The same, with the size of the body that will be forwarded added."""
        return self if self.input_bytes is None else replace(self, input_bytes=self.input_bytes + size_bytes)


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a request can use: input tokens in all, and output tokens of each of its answers."""

    input_tokens: int
    answers: int
    output_tokens_each: int
    echo: bool = False

    def tokens(self, output_tokens_each: int) -> Tokens:
        """The use if every answer has output_tokens_each tokens."""
        echoed = self.input_tokens if self.echo else 0
        return Tokens(self.input_tokens, self.answers * (output_tokens_each + echoed) if self.answers else 0)


def read_request(operation: Operation, body: object, size_bytes: int, extra_fields: Collection[str] = ()) -> Ask:
    """Read the fields that decide about the cost; size_bytes is the length of the body as it will be forwarded.

    Raises InvalidRequest for a field of the wrong type, out of range, or not known to be free of charge.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    _refuse_unknown(operation, body, extra_fields)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("'model' must be a string", "model")
    match operation:
        case "chat":
            return _read_chat(body, model, size_bytes)
        case "text_completion":
            return _read_completion(body, model, size_bytes)
        case "embeddings":
            prompts, least = _count_prompts(body, "input")
            return Ask("embeddings", model, size_bytes, prompts=prompts, completions=0, least_input_tokens=least)


def bound_of(ask: Ask, model: Model) -> Bound:
    """The most that ask can use of model."""
    context = model.context_window * ask.prompts
    if ask.input_bytes is None:
        input_tokens = context
    else:
        input_tokens = min(context, ask.input_bytes + ask.template_bytes + model.template_tokens * ask.prompts)
    answers = ask.completions * ask.prompts
    if not answers:
        return Bound(input_tokens, 0, 0)
    most = min(model.max_output_tokens, model.context_window)
    if ask.max_tokens is not None:
        most = min(most, ask.max_tokens)
    else:
        # Servers refuse a max_tokens that does not fit beside the prompt. The client named none, so what is put
        # in must fit: beside the bound where that is small, else beside three quarters of the context window.
        beside = min(input_tokens // ask.prompts, model.context_window * 3 // 4)
        most = max(1, min(most, model.context_window - beside))
    return Bound(input_tokens, answers, most, ask.echo)


def least_output(bound: Bound) -> int:
    """The output per answer below which the request is not worth forwarding."""
    return min(bound.output_tokens_each, MIN_OUTPUT_TOKENS)


def affordable_output(bound: Bound, model: Model, femto: int) -> int:
    """The most output tokens per answer whose cost, with the input's, stays within femto; 0 if none does."""
    rest = femto - worst_femto(bound, model, 0)
    if rest < 0:
        return 0
    each = bound.answers * model.prices.output_femto
    return bound.output_tokens_each if not each else min(bound.output_tokens_each, rest // each)


def worst_femto(bound: Bound, model: Model, output_tokens_each: int) -> int:
    """The dearest cost that the use can have, in femto-credits: all input at the dearest input price."""
    tokens = bound.tokens(output_tokens_each)
    return tokens.input * model.prices.dearest_input_femto() + tokens.output * model.prices.output_femto


def estimated_input(ask: Ask, bound: Bound) -> int:
    """Input tokens to charge where no upstream told them: the documented rule, within the bound."""
    if ask.input_bytes is None:
        return bound.input_tokens
    return min(bound.input_tokens, -(-ask.input_bytes // BYTES_PER_TOKEN))


def _refuse_unknown(operation: Operation, body: dict[str, Any], extra_fields: Collection[str]) -> None:
    unknown = body.keys() - _FIELDS[operation]
    for name in sorted(unknown):
        if body[name] is not None and name not in extra_fields:
            raise InvalidRequest(
                f"{name[:64]!r} is not supported here: its effect on the cost is not known to the gateway", name[:64]
            )


def _read_chat(body: dict[str, Any], model: str, size_bytes: int) -> Ask:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("'messages' must be a non-empty array", "messages")
    kinds = {_is_text(message, index) for index, message in enumerate(messages)}
    _only(body, "modalities", (["text"],))
    _only(body, "service_tier", ("auto", "default"))
    _check_template_arguments(body)
    for index, tool in enumerate(_list(body, "tools")):
        if not isinstance(tool, dict) or tool.get("type") not in ("function", "custom"):
            raise InvalidRequest("only tools of type 'function' or 'custom' are supported", f"tools[{index}].type")
    limits = [_whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    streamed = _read_stream(body)
    return Ask(
        "chat",
        model,
        size_bytes if kinds == {True} else None,
        template_bytes=_as_template_writes(body),
        completions=_whole(body, "n", 1, MAX_COMPLETIONS) or 1,
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        **streamed,
    )


def _as_template_writes(body: dict[str, Any]) -> int:
    """Bytes that templates may add by writing schemas indented (Llama 3 by four) and escaped into the prompt."""
    added = 0
    for name in ("tools", "functions", "response_format", "json_schema"):
        if schema := body.get(name):
            depth = _depth(schema, name)
            compact = orjson.dumps(schema)
            lines = compact.count(b",") + 2 * (compact.count(b"{") + compact.count(b"["))
            added += 2 * (len(compact) + lines * (4 * depth + 2))
    return added


def _depth(value: object, name: str, level: int = 0) -> int:
    if level > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{name!r} is nested more than {MAX_SCHEMA_DEPTH} levels deep", name)
    inner: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((_depth(item, name, level + 1) for item in inner), default=level)


def _check_template_arguments(body: dict[str, Any]) -> None:
    # Others replace the template itself, and with it what the prompt's bytes can become.
    for name, value in _dict(body, "chat_template_kwargs").items():
        if name not in _TEMPLATE_ARGUMENTS or not (value is None or isinstance(value, (bool, str))):
            param = f"chat_template_kwargs.{name[:64]}"
            raise InvalidRequest(f"{param!r} is not supported here: its effect on the cost is not known", param)


def _read_completion(body: dict[str, Any], model: str, size_bytes: int) -> Ask:
    prompts, least = _count_prompts(body, "prompt")
    streamed = _read_stream(body)
    return Ask(
        "text_completion",
        model,
        size_bytes,
        prompts=prompts,
        completions=max(_whole(body, "n", 1, MAX_COMPLETIONS) or 1, _whole(body, "best_of", 1, MAX_COMPLETIONS) or 1),
        least_input_tokens=least,
        # The API's own default of 16 is not every server's: the limit is always sent.
        max_tokens=_whole(body, "max_tokens", 1) or 16,
        echo=_bool(body, "echo"),
        **streamed,
    )


def _is_text(message: object, index: int) -> bool:
    if not isinstance(message, dict):
        raise InvalidRequest("each message must be an object", f"messages[{index}]")
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise InvalidRequest("'content' must be a string or an array of parts", f"messages[{index}].content")
    parts = content if isinstance(content, list) else []
    return _filled(message) <= _MESSAGE_KEYS and all(
        isinstance(part, dict) and part.get("type") in ("text", "refusal") and _filled(part) <= _PART_KEYS
        for part in parts
    )


def _filled(fields: dict[str, Any]) -> set[str]:
    """The names of the fields that hold anything: clients send answers back with all their empty ones."""
    return {name for name, value in fields.items() if value is not None and value != []}


def _count_prompts(body: dict[str, Any], field: str) -> tuple[int, int]:
    """How many inputs the field holds, and what several of them cannot be less than in tokens. It may be a text, a
    list of texts, a list of token ids or a list of those."""
    value = body.get(field)
    if isinstance(value, str):
        return 1, 0
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{field!r} must be a string or a non-empty array", field)
    if all(type(item) is int for item in value):
        return 1, len(value)
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{field!r} has {len(value)} items; at most {MAX_PROMPTS} are taken", field)
    least = 0
    for index, item in enumerate(value):
        if isinstance(item, str):
            least += len(item) // MOST_CHARACTERS_PER_TOKEN
        elif isinstance(item, list) and all(type(token) is int for token in item):
            least += len(item)
        else:
            raise InvalidRequest("each item must be a string or an array of token ids", f"{field}[{index}]")
    return len(value), least


def _read_stream(body: dict[str, Any]) -> dict[str, bool]:
    """The fields of Ask that concern streams."""
    options = _dict(body, "stream_options")
    return {
        "stream": _bool(body, "stream"),
        "wants_usage": _bool(options, "include_usage", "stream_options.include_usage"),
        "wants_running_usage": _bool(options, "continuous_usage_stats", "stream_options.continuous_usage_stats"),
    }


def _whole(body: dict[str, Any], name: str, least: int, most: int = 10**9) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"{name!r} must be a whole number from {least} to {most}", name)
    return value


def _bool(body: dict[str, Any], name: str, param: str | None = None) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{param or name!r} must be true or false", param or name)
    return bool(value)


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise InvalidRequest(f"{name!r} must be an array", name)
    return value or []


def _dict(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidRequest(f"{name!r} must be an object", name)
    return value or {}


def _only(body: dict[str, Any], name: str, allowed: tuple[object, ...]) -> None:
    value = body.get(name)
    if value is not None and value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise InvalidRequest(f"{name!r} can only be {choices} here: others have another price", name)
