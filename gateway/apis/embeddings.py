"""POST /embeddings."""

from typing import Any

from gateway.apis.api import Api
from gateway.apis.fields import EVERYWHERE
from gateway.apis.text import count_prompts
from gateway.domain.request import Ask
from gateway.upstream.usage.billing import Answer
from gateway.upstream.usage.embeddings import read_embeddings


class Embeddings(Api):
    """Texts or token ids in, vectors out. There is no output to charge."""

    path = "/embeddings"
    name = "embeddings"
    operation = "embeddings"
    fields = EVERYWHERE | frozenset({"input", "dimensions", "encoding_format", "truncate_prompt_tokens"})

    def read_answer(self, body: bytes) -> Answer | None:
        """An answer with data."""
        return read_embeddings(body)

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        prompts, least = count_prompts(body, "input")
        return Ask(self.operation, model, 0, prompts=prompts, completions=0, least_input_tokens=least)
