"""What every metered endpoint must say of itself."""

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
    parameters: those of the URL's query that are forwarded. dialect: of its errors. takes_form: its body is a form, not
    JSON. typed_fields: of a form, those that are numbers or true and false. passes_bytes: an answer that is no stream
    of events is passed on unread as it comes; what it costs is known before.
    """

    path: ClassVar[str]
    name: ClassVar[str]
    operation: ClassVar[Operation]
    fields: ClassVar[frozenset[str]]
    set_fields: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[frozenset[str]] = frozenset()
    dialect: ClassVar[Dialect] = "openai"
    takes_form: ClassVar[bool] = False
    typed_fields: ClassVar[frozenset[str]] = frozenset()
    passes_bytes: ClassVar[bool] = False

    def read(self, body: object, allowed: Collection[str] = ()) -> Ask:
        """What a decoded body asks for, its size not counted yet (``Ask.of_size``). allowed: fields that are let
        through besides. Raises InvalidRequest for a field of the wrong type, out of range, or not known to be free."""
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        if not body.keys() <= self.fields:
            refuse_unknown(body, self.fields, allowed)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("'model' must be a string", "model")
        return self._read(body, model)

    def check_sold(self, ask: Ask, model: Model) -> None:
        """Raises InvalidRequest where the model's prices do not say what ask costs."""
        if model.prices.tokens is None:
            raise self.unsold(ask)

    def unsold(self, ask: Ask) -> InvalidRequest:
        """What to raise for a model that has no price here."""
        return InvalidRequest(f"the model {ask.model!r} has no price for {self.path}", "model")

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The set_fields as they are forwarded. taken: what the client wrote in them."""
        return {}

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> EventStream:
        """A follower of the stream that answers ask. rule: how its output is counted."""
        raise NotImplementedError(f"{self.path} does not stream")

    def answer_to(self, ask: Ask, body: bytes) -> Answer | None:
        """A whole answer to ask; None where it is of no use."""
        return self.read_answer(body)

    @abstractmethod
    def read_answer(self, body: bytes) -> Answer | None:
        """A whole answer, whatever was asked; None where it is of no use."""

    @abstractmethod
    def _read(self, body: dict[str, Any], model: str) -> Ask:
        """What body asks of the model of that name."""
