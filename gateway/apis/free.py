"""Endpoints that cost nothing: forwarded as they are, for whoever has a key."""

from collections.abc import Mapping

from gateway.apis.api import Dialect
from gateway.apis.messages import Messages
from gateway.domain.request import InvalidRequest
from gateway.domain.value import value


@value(frozen=True, slots=True)
class FreeApi:
    """path: below ``/v1``. default_model: the one that is meant where a body names none; empty: it must. parameters:
    those of the URL's query that are forwarded. dialect: of its errors."""

    path: str
    default_model: str = ""
    parameters: frozenset[str] = frozenset()
    dialect: Dialect = "openai"

    def model_of(self, body: object) -> str:
        """The model that a decoded body names. Raises InvalidRequest."""
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        model = body.get("model")
        if model is None:
            model = self.default_model
        if not isinstance(model, str) or not model:
            raise InvalidRequest("'model' must be a string", "model")
        return model


#: By path, below ``/v1``.
FREE_APIS: Mapping[str, FreeApi] = {
    api.path: api
    for api in (
        FreeApi("/moderations", default_model="omni-moderation-latest"),
        FreeApi("/responses/input_tokens"),
        FreeApi("/messages/count_tokens", parameters=Messages.parameters, dialect=Messages.dialect),
    )
}
