"""What endpoints with text and sampled answers have in common."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

from gateway.apis.fields import boolean, mapping
from gateway.config.model import Upstream
from gateway.domain.request import MOST_CHARACTERS_PER_TOKEN, Ask, Bound, InvalidRequest

MAX_COMPLETIONS = 128
MAX_PROMPTS = 2048
MAX_SCHEMA_DEPTH = 64

#: Fields that shape an answer, at no cost of their own.
SAMPLING = frozenset(
    "temperature top_p top_k min_p typical_p top_a repetition_penalty presence_penalty frequency_penalty logit_bias "
    "seed stop stop_token_ids bad_words ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens "
    "logprobs top_logprobs prompt_logprobs response_format guided_json guided_regex guided_choice guided_grammar "
    "structured_outputs grammar json_schema stream stream_options max_tokens n cache_prompt samplers mirostat "
    "mirostat_tau mirostat_eta repeat_penalty repeat_last_n dry_multiplier dry_base dry_allowed_length "
    "dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold store prompt_cache_key "
    "prompt_cache_retention add_special_tokens return_tokens_as_token_ids include_stop_str_in_output".split()
)

#: Fields that limit an answer, and ask for a stream's usage.
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
SET_FIELDS = ("stream_options", *LIMIT_FIELDS)


class Streamed(NamedTuple):
    """The fields of Ask that concern streams."""

    stream: bool
    wants_usage: bool = False
    wants_running_usage: bool = False


_PLAIN = Streamed(stream=False), Streamed(stream=True)


def read_stream(body: dict[str, Any]) -> Streamed:
    """Whether the answer is streamed, and what of its usage is shown."""
    streamed = body.get("stream")
    if streamed is not True and streamed is not False:
        streamed = boolean(body, "stream")
    options = mapping(body, "stream_options") if "stream_options" in body else None
    if not options:
        return _PLAIN[streamed]
    return Streamed(
        streamed,
        wants_usage=boolean(options, "include_usage", "stream_options.include_usage"),
        wants_running_usage=boolean(options, "continuous_usage_stats", "stream_options.continuous_usage_stats"),
    )


def limited(ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
    """The SET_FIELDS for the upstream: the output limited to what is held, the usage asked for."""
    written: dict[str, object] = {}
    if bound.answers:
        written[upstream.limit_field] = bound.output_tokens_each
    options = dict(taken["stream_options"] or {}) if "stream_options" in taken else {}
    if ask.stream and upstream.stream_usage:
        options["include_usage"] = True
        if upstream.count_output == "usage" and bound.answers == 1:
            options["continuous_usage_stats"] = True
    if options:
        written["stream_options"] = options
    return written


def count_prompts(body: dict[str, Any], field: str) -> tuple[int, int]:
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


def as_template_writes(body: dict[str, Any], schemas: Iterable[str]) -> int:
    """Bytes that templates may add by writing the fields that hold schemas indented (Llama 3 by four) and escaped into
    the prompt. Raises InvalidRequest for one that is nested too deeply."""
    added = 0
    for name in schemas:
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
