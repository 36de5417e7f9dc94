"""What every metered endpoint that takes JSON must say of itself."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from gateway.apis.fields import refuse_unknown
from gateway.config.model import CountOutput, Upstream
from gateway.domain.model import Model
from gateway.domain.request import Ask, Bound, InvalidRequest, Operation
from gateway.upstream.sse import EventStream
from gateway.upstream.usage import Answer

#: Whose words errors are told in.
Dialect: TypeAlias = Literal["openai", "anthropic"]


class Api(ABC):
    """One endpoint.

    path: below ``/v1``. name: unlike that of any other endpoint. operation: what metrics call it. fields: those of the
    body whose meaning for the cost is known; others are refused, because what an upstream understands and the gateway
    does not would be forwarded at one price and answered at another. set_fields: those that the gateway writes anew.
    parameters: those of the URL's query that are forwarded. dialect: of its errors.
    """

    path: ClassVar[str]
    name: ClassVar[str]
    operation: ClassVar[Operation]
    fields: ClassVar[frozenset[str]]
    set_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset()
    dialect: ClassVar[Dialect] = "openai"

    def read(self, body: object, allowed: Collection[str] = ()) -> Ask:
        """What a decoded body asks for, its size not counted yet (``Ask.of_size``). allowed: fields that are let
        through besides. Raises InvalidRequest for a field of the wrong type, out of range, or not known to be free."""
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        refuse_unknown(body, self.fields, allowed)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("'model' must be a string", "model")
        return self._read(body, model)

    def sells(self, model: Model) -> bool:
        """Whether the model's prices say what this endpoint costs."""
        return model.prices.tokens is not None

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The set_fields as they are forwarded. taken: what the client wrote in them."""
        return {}

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> EventStream:
        """A follower of the stream that answers ask. rule: how its output is counted."""
        raise NotImplementedError(f"{self.path} does not stream")

    @abstractmethod
    def read_answer(self, body: bytes) -> Answer | None:
        """A whole answer; None where it is of no use."""

    @abstractmethod
    def _read(self, body: dict[str, Any], model: str) -> Ask:
        """What body asks of the model of that name."""
