"""A path that the configuration prices by the request: what goes through it is read by nobody here."""

from typing import Any

from gateway.apis.api import Api
from gateway.domain.metered import Metered
from gateway.domain.request import Ask, Bound
from gateway.upstream.usage import Answer


class Unread(Api):
    """One request, whatever is in it. It is paid for once the upstream has answered well."""

    path = ""
    name = "passthrough"
    operation = "passthrough"
    passes_bytes = True
    fields = frozenset()

    def ask(self, pattern: str) -> Ask:
        """What a request to a path of the pattern asks for."""
        return Ask(self.operation, pattern, 0, completions=0)

    def read_answer(self, body: bytes) -> Answer:
        """Any will do."""
        return _AnyAnswer(None, len(body), 0)

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        raise NotImplementedError("nothing of it is read")


class _AnyAnswer(Answer):
    def metered(self, ask: Ask, bound: Bound) -> Metered:
        return bound.units
