"""POST /responses."""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE, boolean, items, mapping, only, text, whole
from gateway.apis.responses_items import texts_of
from gateway.apis.responses_stream import ResponseStream
from gateway.apis.text import SAMPLING, as_template_writes
from gateway.config.model import CountOutput, Upstream
from gateway.domain.request import Ask, Bound, InvalidRequest
from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.responses import read_response_usage
from gateway.upstream.usage.shown import answer_of

#: Tools that the client runs. All others run at the upstream: they have a price of their own, or put text into the
#: input of one more answer after another, of which no bound is known.
CLIENT_TOOLS = ("function", "custom")

# What the upstream has stored is no longer than the context window, and nothing else is known of it.
_STORED = ("previous_response_id", "conversation", "prompt")
_MODE = "reasoning.mode"
_SCHEMAS = ("tools", "text", "response_format", "json_schema")
# The keys of items that are text and nothing else. An item or a part of another type, or with another key, may stand
# for anything: then the text's bytes bound nothing, and the whole context window is held.
_ITEM_KEYS = {
    "message": frozenset("id type status role content phase".split()),
    "function_call": frozenset("id type status call_id name arguments".split()),
    "function_call_output": frozenset("id type status call_id output".split()),
    "custom_tool_call": frozenset("id type status call_id name input".split()),
    "custom_tool_call_output": frozenset("id type status call_id output".split()),
    "reasoning": frozenset("id type status content summary".split()),
}
_PART_TYPES = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_PART_KEYS = frozenset("type text refusal logprobs".split())
# Clients send answers back with their citations, of which templates write nothing that is not in the request.
_CITATIONS = "annotations"


class Responses(Api):
    """Items in, one response of several items out."""

    path = "/responses"
    name = "responses"
    operation = "chat"
    fields = (
        EVERYWHERE
        | (SAMPLING - {"max_tokens", "n"})
        | frozenset(_STORED)
        | frozenset(
            "input instructions max_output_tokens max_tool_calls truncation reasoning text tools tool_choice "
            "parallel_tool_calls include background service_tier verbosity".split()
        )
    )
    set_fields = ("max_output_tokens",)

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The limit."""
        return {"max_output_tokens": bound.output_tokens_each}

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> ResponseStream:
        """Events of one response."""
        return ResponseStream(ask, bound, rule)

    def read_answer(self, body: bytes) -> Answer | None:
        """A response that came to its end; one that failed is of no use."""
        try:
            response = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(response, dict) or response.get("error"):
            return None
        if response.get("status") not in (None, "completed", "incomplete"):
            return None
        return answer_of(list(texts_of(response.get("output"))), read_response_usage(response.get("usage")))

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        if boolean(body, "background"):
            raise InvalidRequest("'background' is not supported here: what it costs is known only later", "background")
        only(body, "service_tier", ("auto", "default"))
        if mapping(body, "reasoning").get("mode") not in (None, "standard"):
            raise InvalidRequest("'reasoning.mode' can only be 'standard' here: others have another price", _MODE)
        for name in ("stream_options", "text"):
            mapping(body, name)
        text(body, "instructions")
        _check_tools(items(body, "tools"), "tools")
        stored = any(body.get(name) for name in _STORED)
        return Ask(
            self.operation,
            model,
            0 if _is_text(body, stored=stored) and not stored else None,
            template_bytes=as_template_writes(body, _SCHEMAS),
            max_tokens=whole(body, "max_output_tokens", 1),
            stream=boolean(body, "stream"),
            wants_usage=True,
            # More is thought than a summary, or what is encrypted, shows.
            hides_output=bool(mapping(body, "reasoning").get("summary"))
            or "reasoning.encrypted_content" in items(body, "include"),
        )


def _check_tools(tools: list[Any], param: str) -> None:
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") not in CLIENT_TOOLS:
            raise InvalidRequest(
                "only tools of type 'function' or 'custom' are supported: what others cost is not known here",
                f"{param}[{index}].type",
            )


def _is_text(body: dict[str, Any], *, stored: bool) -> bool:
    """Whether the input is text, of which no token is without a byte."""
    given = body.get("input")
    if isinstance(given, str):
        return True
    if given is None and stored:
        return False
    if not isinstance(given, list) or not (given or stored):
        raise InvalidRequest("'input' must be a string or a non-empty array", "input")
    kinds = {_is_text_item(item, f"input[{index}]") for index, item in enumerate(given)}  # each must be looked at
    return kinds <= {True}


def _is_text_item(item: object, param: str) -> bool:
    if not isinstance(item, dict):
        raise InvalidRequest("each item must be an object", param)
    # Some items bring tools along, which count as if they stood among the request's own.
    brought = item.get("tools")
    if brought is not None:
        _check_tools(brought if isinstance(brought, list) else [brought], f"{param}.tools")
    # What has no type is a message where it has a role, else a reference to something that is stored.
    kind = item.get("type") or ("message" if item.get("role") else "")
    known = _ITEM_KEYS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    if not _filled(item) <= known or (kind == "message" and item.get("content") is None):
        return False
    return all(_is_text_content(item.get(name)) for name in ("content", "summary", "output"))


def _is_text_content(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in _PART_TYPES and _filled(part) - {_CITATIONS} <= _PART_KEYS
        for part in content
    )


def _filled(fields: dict[str, Any]) -> set[str]:
    """The names of the fields that hold anything: clients send answers back with all their empty ones."""
    return {name for name, value in fields.items() if value is not None and value != []}
