"""All metered endpoints."""

from collections.abc import Mapping

from gateway.apis.api import Api
from gateway.apis.chat import Chat
from gateway.apis.completions import Completions
from gateway.apis.embeddings import Embeddings
from gateway.apis.images import Edits, Generations, Variations
from gateway.apis.messages import Messages
from gateway.apis.rerank import Rerank
from gateway.apis.responses import Responses
from gateway.apis.speech import Speech
from gateway.apis.transcriptions import Transcriptions, Translations

#: By path, below ``/v1``.
APIS: Mapping[str, Api] = {
    api.path: api
    for api in (
        Chat(),
        Completions(),
        Edits(),
        Embeddings(),
        Generations(),
        Messages(),
        Rerank(),
        Responses(),
        Speech(),
        Transcriptions(),
        Translations(),
        Variations(),
    )
}
