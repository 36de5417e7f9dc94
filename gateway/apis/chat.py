"""POST /chat/completions."""

from collections.abc import Mapping
from typing import Any

from gateway.apis.api import Api
from gateway.apis.chat_stream import ChatStream
from gateway.apis.fields import EVERYWHERE, items, mapping, only, whole
from gateway.apis.text import MAX_COMPLETIONS, SAMPLING, SET_FIELDS, as_template_writes, limited, read_stream
from gateway.config.model import CountOutput, Upstream
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.upstream.usage.choices import read_choices

# Any other key of a message or of a text part may be another kind of content to some upstream: then the text's
# bytes bound nothing, and the whole context window is held.
_MESSAGE_KEYS = frozenset(
    "role content name tool_calls tool_call_id function_call refusal reasoning_content reasoning".split()
)
_PART_KEYS = frozenset({"type", "text", "refusal"})
_SCHEMAS = ("tools", "functions", "response_format", "json_schema")
# What most requests have none of.
_EXTRAS = frozenset({"modalities", "service_tier", "chat_template_kwargs", "tools", *_SCHEMAS})
_TEMPLATE_ARGUMENTS = frozenset({"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort"})


class Chat(Api):
    """Messages in, one or several answers out."""

    path = "/chat/completions"
    name = "chat"
    operation = "chat"
    fields = (
        EVERYWHERE
        | SAMPLING
        | frozenset(
            "messages max_completion_tokens tools tool_choice parallel_tool_calls functions function_call "
            "reasoning_effort verbosity chat_template_kwargs add_generation_prompt continue_final_message "
            "reasoning_format thinking_forced_open modalities service_tier include_reasoning".split()
        )
    )
    set_fields = SET_FIELDS
    read_answer = staticmethod(read_choices)

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The limit and the stream's options."""
        return limited(ask, bound, taken, upstream)

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> ChatStream:
        """Chunks with deltas."""
        return ChatStream(ask, bound, rule)

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InvalidRequest("'messages' must be a non-empty array", "messages")
        input_bytes = 0 if _are_texts(messages) else None
        template_bytes = 0
        if not _EXTRAS.isdisjoint(body):
            _check_extras(body)
            template_bytes = as_template_writes(body, _SCHEMAS)
        limit = whole(body, "max_completion_tokens", 1) if "max_completion_tokens" in body else None
        if "max_tokens" in body:
            older_limit = whole(body, "max_tokens", 1)
            if limit is None or (older_limit is not None and older_limit < limit):
                limit = older_limit
        stream, wants_usage, wants_running_usage = read_stream(body)
        completions = (whole(body, "n", 1, MAX_COMPLETIONS) or 1) if "n" in body else 1
        # In the order of its fields: by their names it takes twice the time.
        return Ask(
            "chat", model, input_bytes, 1, completions, template_bytes, 0, limit, False,
            stream, wants_usage, wants_running_usage,
        )  # fmt: skip


def _check_extras(body: dict[str, Any]) -> None:
    only(body, "modalities", (["text"],))
    only(body, "service_tier", ("auto", "default"))
    _check_template_arguments(body)
    for index, tool in enumerate(items(body, "tools")):
        if not isinstance(tool, dict) or tool.get("type") not in ("function", "custom"):
            raise InvalidRequest("only tools of type 'function' or 'custom' are supported", f"tools[{index}].type")


def _check_template_arguments(body: dict[str, Any]) -> None:
    # Others replace the template itself, and with it what the prompt's bytes can become.
    for name, value in mapping(body, "chat_template_kwargs").items():
        if name not in _TEMPLATE_ARGUMENTS or not (value is None or isinstance(value, (bool, str))):
            param = f"chat_template_kwargs.{name[:64]}"
            raise InvalidRequest(f"{param!r} is not supported here: its effect on the cost is not known", param)


def _are_texts(messages: list[Any]) -> bool:
    """Whether there is nothing but text in any of them."""
    texts = True
    for index, message in enumerate(messages):
        # As nearly all are: without the call, a third of the work.
        if type(message) is dict and type(message.get("content")) is str and _MESSAGE_KEYS.issuperset(message):
            continue
        texts = _is_text(message, index) and texts
    return texts


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
