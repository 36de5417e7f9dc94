"""Fields of a request's body, each with its type checked. All raise InvalidRequest, which names the field."""

from collections.abc import Collection
from typing import Any

from gateway.domain.request import InvalidRequest

#: Fields that no endpoint charges for.
EVERYWHERE = frozenset({"model", "user", "metadata", "safety_identifier"})


def refuse_unknown(body: dict[str, Any], known: frozenset[str], allowed: Collection[str]) -> None:
    """Let only fields through whose meaning for the cost is known. allowed: those that the operator answers for."""
    if known.issuperset(body):
        return
    unknown = [name for name in body.keys() - known if body[name] is not None and name not in allowed]
    if unknown:
        name = min(unknown)[:64]
        raise InvalidRequest(
            f"{name!r} is not supported here: its effect on the cost is not known to the gateway", name
        )


def whole(body: dict[str, Any], name: str, least: int, most: int = 10**9) -> int | None:
    """A whole number, or None."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"{name!r} must be a whole number from {least} to {most}", name)
    return value


def boolean(body: dict[str, Any], name: str, param: str | None = None) -> bool:
    """True or false, which is also what a missing field is."""
    value = body.get(name)
    if value is None:
        return False
    if value is True or value is False:
        return value
    raise InvalidRequest(f"{param or name!r} must be true or false", param or name)


def items(body: dict[str, Any], name: str) -> list[Any]:
    """An array; empty where the field is missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise InvalidRequest(f"{name!r} must be an array", name)
    return value or []


def mapping(body: dict[str, Any], name: str) -> dict[str, Any]:
    """An object; empty where the field is missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidRequest(f"{name!r} must be an object", name)
    return value or {}


def text(body: dict[str, Any], name: str) -> str | None:
    """A string, or None."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{name!r} must be a string", name)
    return value


def only(body: dict[str, Any], name: str, allowed: tuple[object, ...]) -> None:
    """One of the values that are allowed, or nothing."""
    value = body.get(name)
    if value is not None and value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise InvalidRequest(f"{name!r} can only be {choices} here: others have another price", name)
