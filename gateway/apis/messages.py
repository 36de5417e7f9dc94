"""POST /messages, in Anthropic's shape.

A token of the cache that is kept for longer costs more to write, and has no price here: only the usual five minutes are
let through. Thinking counts inside max_tokens; where the gateway lowers that, the budget is lowered in proportion, so
that room for the answer is left, and where less is left than any thinking needs, the model answers without.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, boolean, items, mapping, only, whole
from gateway.apis.messages_stream import MessageStream
from gateway.apis.text import as_template_writes
from gateway.config.model import CountOutput, Upstream
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.messages import read_message

#: The API takes no smaller budget of thinking.
MIN_THINKING_TOKENS = 1024

_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_OUTPUT_CONFIG = frozenset({"effort", "format", "task_budget"})
#: Tools that the client runs. The upstream puts a text of its own into the prompt for each, of unknown length.
_CLIENT_TOOLS = ("bash_", "text_editor_", "computer_", "memory_")
# The keys of blocks that are text and nothing else. A block of another type, or with another key, may stand for
# anything: then the text's bytes bound nothing, and the whole context window is held.
_BLOCK_KEYS = {
    "text": frozenset("type text citations cache_control".split()),
    "tool_use": frozenset("type id name input caller cache_control".split()),
    "tool_result": frozenset("type tool_use_id content is_error cache_control".split()),
    "thinking": frozenset("type thinking signature".split()),
    "redacted_thinking": frozenset("type data".split()),
}
_TEXTS = ("text", "thinking", "data")
_MESSAGE_KEYS = frozenset({"role", "content"})
# Blocks stand in blocks (a tool's results, documents), but not deeper than this. What a tool was called with, and the
# schema for it, are the client's own and hold none.
MAX_BLOCK_DEPTH = 32
_NO_BLOCKS = ("input", "input_schema")


class Messages(Api):
    """Messages in, one answer out, as blocks of text, thinking and calls of tools."""

    path = "/messages"
    name = "messages"
    operation = "chat"
    dialect = "anthropic"
    parameters = frozenset({"beta"})
    fields = EVERYWHERE | frozenset(
        "messages system max_tokens stop_sequences stream temperature top_k top_p tools tool_choice thinking "
        "output_config service_tier cache_control".split()
    )
    set_fields = ("max_tokens", "thinking")

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The limit, and a budget of thinking that fits in it."""
        most = bound.output_tokens_each
        thinking = taken.get("thinking")
        return {
            "max_tokens": most,
            **({} if thinking is None else {"thinking": _within(thinking, ask.max_tokens or most, most)}),
        }

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> MessageStream:
        """Events of one message."""
        return MessageStream(ask, bound, rule)

    def read_answer(self, body: bytes) -> Answer | None:
        """A message."""
        return read_message(body)

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        max_tokens = whole(body, "max_tokens", 1)
        if max_tokens is None:
            raise InvalidRequest("'max_tokens' is required", "max_tokens")
        only(body, "service_tier", ("auto", "standard_only"))
        mapping(body, "tool_choice")
        _check_thinking(body)
        _check_output_config(body)
        _check_caches({name: body.get(name) for name in ("cache_control", "system", "messages", "tools")}, "")
        given = [*_system_of(body), *_contents_of(body)]
        kinds = {_is_text(blocks, param) for blocks, param in given}  # each must be looked at
        kinds |= {_is_custom(tool, f"tools[{index}]") for index, tool in enumerate(items(body, "tools"))}
        kinds |= {_filled(message) <= _MESSAGE_KEYS for message in body["messages"]}
        return Ask(
            self.operation,
            model,
            0 if kinds <= {True} else None,
            template_bytes=as_template_writes(body, ("tools", "output_config"))
            + sum(as_template_writes(block, ("input",)) for blocks, _ in given for block in blocks),
            max_tokens=max_tokens,
            stream=boolean(body, "stream"),
            wants_usage=True,
            # What is shown of it is a summary; all of it is billed.
            hides_output=mapping(body, "thinking").get("type") not in (None, "disabled"),
        )


def _within(thinking: dict[str, Any], asked: int, most: int) -> dict[str, Any]:
    """The thinking that was asked for with max_tokens of asked, as it fits into most."""
    budget = thinking.get("budget_tokens")
    # A budget beyond max_tokens is for a whole turn with its tools: it does not have to fit.
    if thinking.get("type") != "enabled" or budget is None or most >= asked or budget >= asked:
        return thinking
    fitting = max(budget * most // asked, min(budget, MIN_THINKING_TOKENS))
    return {**thinking, "budget_tokens": fitting} if fitting < most else {"type": "disabled"}


def _check_thinking(body: dict[str, Any]) -> None:
    thinking = mapping(body, "thinking")
    if thinking and thinking.get("type") not in _THINKING:
        choices = " or ".join(map(repr, _THINKING))
        raise InvalidRequest(f"'thinking.type' must be {choices}", "thinking.type")
    budget = thinking.get("budget_tokens")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise InvalidRequest("'thinking.budget_tokens' must be a whole number above 0", "thinking.budget_tokens")


def _check_output_config(body: dict[str, Any]) -> None:
    for name in sorted(mapping(body, "output_config").keys() - _OUTPUT_CONFIG):
        param = f"output_config.{name[:64]}"
        raise InvalidRequest(f"{param!r} is not supported here: its effect on the cost is not known", param)


def _check_caches(value: object, param: str, depth: int = 0) -> None:
    """Let nothing be kept for longer, wherever it stands."""
    if depth > 2 * MAX_BLOCK_DEPTH:
        raise InvalidRequest(f"blocks are nested more than {MAX_BLOCK_DEPTH} levels deep", param)
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_caches(item, f"{param}[{index}]", depth + 1)
    if not isinstance(value, dict):
        return
    if mapping(value, "cache_control").get("ttl") not in (None, "5m"):
        param = f"{param}.cache_control.ttl".lstrip(".")
        raise InvalidRequest(f"{param!r} can only be '5m' here: others have another price", param)
    for name, item in value.items():
        if name not in _NO_BLOCKS and isinstance(item, (list, dict)):
            _check_caches(item, f"{param}.{name[:64]}".lstrip("."), depth + 1)


def _system_of(body: dict[str, Any]) -> Iterable[tuple[list[Any], str]]:
    """The blocks of the system prompt, and where they are."""
    system = body.get("system")
    if isinstance(system, list):
        yield from _blocks_in(system, "system")
    elif system is not None and not isinstance(system, str):
        raise InvalidRequest("'system' must be a string or an array of blocks", "system")


def _contents_of(body: dict[str, Any]) -> Iterable[tuple[list[Any], str]]:
    """The blocks of each message and those in them, at every depth, and where they are."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("'messages' must be a non-empty array", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest("each message must be an object", f"messages[{number}]")
        param = f"messages[{number}].content"
        content = message.get("content")
        if isinstance(content, list):
            yield from _blocks_in(content, param)
        elif not isinstance(content, str):
            raise InvalidRequest("'content' must be a string or an array of blocks", param)


def _blocks_in(blocks: list[Any], param: str) -> Iterable[tuple[list[Any], str]]:
    yield blocks, param
    for index, block in enumerate(blocks):
        if isinstance(block, dict) and isinstance(content := block.get("content"), list):
            yield from _blocks_in(content, f"{param}[{index}].content")


def _is_text(blocks: list[Any], param: str) -> bool:
    """Whether the blocks are text, of which no token is without a byte."""
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise InvalidRequest("each block must be an object", f"{param}[{index}]")
    return all(
        _filled(block) <= _BLOCK_KEYS.get(str(block.get("type")), frozenset())
        and isinstance(block.get("content") or "", (str, list))
        and all(isinstance(block.get(name) or "", str) for name in _TEXTS)
        for block in blocks
    )


def _is_custom(tool: object, param: str) -> bool:
    """Whether it is a tool of which the upstream knows what the request says, and no more."""
    kind = tool.get("type") if isinstance(tool, dict) else ""
    if not isinstance(tool, dict) or not (kind is None or isinstance(kind, str)):
        raise InvalidRequest("each tool must be an object, its type a string", param)
    if kind in (None, "custom"):
        return True
    if kind.startswith(_CLIENT_TOOLS):
        return False
    raise InvalidRequest(
        f"tools of type {kind[:64]!r} are not supported here: what they cost is not known to the gateway",
        f"{param}.type",
    )


def _filled(fields: dict[str, Any]) -> set[str]:
    """The names of the fields that hold anything: clients send answers back with all their empty ones."""
    return {name for name, value in fields.items() if value is not None and value != []}
