"""Checks a document against its raw model and says what is wrong in plain sentences."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gateway.config.document import Document, Location, dotted
from gateway.config.fields import Context
from gateway.config.problem import suggestion

Raw = TypeVar("Raw", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document that one raw model describes. prefix: where in the document the part begins."""

    document: Document
    tree: Any
    prefix: Location = ()

    def report(self, location: Location, predicate: str, *, at_key: bool = False) -> None:
        """Note a mistake at a location of the section; predicate continues a sentence that begins with its name."""
        full = self._full(location)
        self.document.report(full, f"{self.name(location)} {predicate}", at_key=at_key)

    def name(self, location: Location) -> str:
        """A location of the section as messages call it."""
        full = self._full(location)
        return dotted(full[:-1] if full and full[-1] == "[key]" else full)

    def _full(self, location: Location) -> Location:
        """The location in the document: without the indexes of lists that were written as their only entry."""
        node, written = self.tree, []
        for part in location:
            if isinstance(part, int) and not isinstance(node, list):
                continue
            written.append(part)
            node = _entry(node, part)
        return (*self.prefix, *written)


def _entry(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    return node[part] if isinstance(node, list) and isinstance(part, int) else None


def validate(section: Section, model: type[Raw], context: Context) -> Raw | None:
    """The section as its raw model, or None after every mistake in it has been reported."""
    try:
        return model.model_validate(section.tree, context=context)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    for detail in details:
        _report(section, model, detail)
    return None


def _report(section: Section, model: type[BaseModel], detail: ErrorDetails) -> None:
    location = detail["loc"]
    match detail["type"]:
        case "value_error":
            at_key = bool(location) and location[-1] == "[key]"
            section.report(location, str(detail["ctx"]["error"]), at_key=at_key)
        case "missing":
            report_missing(section, location, _fields(model, location[:-1])[str(location[-1])])
        case "extra_forbidden":
            known = _fields(model, location[:-1])
            section.report(location, f"is not known: {suggestion(str(location[-1]), known)}", at_key=True)
        case "too_short":
            section.report(location, "is empty: add at least one", at_key=True)
        case "too_long":
            most = detail["ctx"]["max_length"]
            section.report(location, f"has {detail['ctx']['actual_length']} entries: keep at most {most}", at_key=True)
        case "list_type":
            section.report(location, "must be a list: begin each entry with `- `")
        case _:
            section.report(location, "must be a mapping of `key: value` lines")


def report_missing(section: Section, location: Location, field: FieldInfo) -> None:
    """Note that a field should stand at a location."""
    how = f"a line such as `{location[-1]}: {field.examples[0]}`" if field.examples else "it"
    section.report(location, f"is missing: add {how}", at_key=True)


def _fields(model: type[BaseModel], location: Iterable[str | int]) -> dict[str, FieldInfo]:
    """The fields of the raw model at a location."""
    kind: Any = model
    for part in location:
        # Of a mapping the values' kind, of a list its entries'.
        kind = kind.model_fields[part].annotation if hasattr(kind, "model_fields") else get_args(kind)[-1]
        kind = _without_none(kind)
    fields: dict[str, FieldInfo] = kind.model_fields
    return fields


def _without_none(kind: Any) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not NoneType]
    return choices[0] if NoneType in get_args(kind) and get_origin(kind) is not dict else kind
