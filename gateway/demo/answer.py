"""One answer in words or in a call of a tool, cut where the request says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.demo.words import split_tokens

MAX_TOOLS = 128

_TOOL = re.compile(r"\btool\b", re.IGNORECASE)
_SAMPLES: dict[str, Any] = {"integer": 1, "number": 1, "boolean": True, "array": [], "object": {}, "null": None}


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: joined they are the answer. cut: the limit ended it. stop: the stop text that ended it.

    tool: the tool that is called, whose arguments the tokens are.
    """

    tokens: tuple[str, ...]
    cut: bool = False
    stop: str | None = None
    tool: str | None = None

    @property
    def text(self) -> str:
        """The answer, or the arguments as JSON."""
        return "".join(self.tokens)


@dataclass(frozen=True, slots=True)
class Tool:
    """What a request says of a tool: its name and the JSON Schema of its arguments."""

    name: str
    schema: dict[str, Any]


def answer_of(said: str, limit: int | None, stops: Sequence[str] = ()) -> Answer:
    """Say it, up to the first stop text and no more than limit tokens."""
    places = sorted((said.find(stop), stop) for stop in stops if stop in said)
    end, stop = places[0] if places else (len(said), None)
    tokens = split_tokens(said[:end])
    if limit is not None and len(tokens) > limit:
        return Answer(tuple(tokens[:limit]), cut=True)
    return Answer(tuple(tokens), stop=stop)


def call_of(tools: Sequence[Tool], asked: str, limit: int | None) -> Answer | None:
    """A call of the first tool, if what was asked has the word "tool" in it.

    The arguments are samples of what the tool requires: no model has thought about them.
    """
    if not tools or not _TOOL.search(asked):
        return None
    tokens = split_tokens(orjson.dumps(_sample(tools[0].schema)).decode())
    return Answer(tuple(tokens[:limit]), cut=limit is not None and len(tokens) > limit, tool=tools[0].name)


def tool_of(name: object, schema: object) -> Tool | None:
    """The tool, if it has a name."""
    return Tool(name, schema if isinstance(schema, dict) else {}) if isinstance(name, str) and name else None


def _sample(schema: dict[str, Any]) -> dict[str, Any]:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    return {str(name): _sample_value(properties.get(str(name))) for name in required}


def _sample_value(schema: object) -> Any:
    if not isinstance(schema, dict):
        return "demo"
    if isinstance(choices := schema.get("enum"), list) and choices:
        return choices[0]
    kind = schema.get("type")
    return _SAMPLES.get(kind, "demo") if isinstance(kind, str) else "demo"
