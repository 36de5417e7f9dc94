"""POST /completions."""

from collections.abc import Mapping
from typing import Any

from gateway.apis.api import Api
from gateway.apis.chat_stream import TextStream
from gateway.apis.fields import EVERYWHERE, boolean, whole
from gateway.apis.text import MAX_COMPLETIONS, SAMPLING, SET_FIELDS, count_prompts, limited, read_stream
from gateway.config.model import CountOutput, Upstream
from gateway.domain.request import Ask, Bound
from gateway.upstream.usage.choices import read_choices


class Completions(Api):
    """Prompts in, one or several continuations of each out."""

    path = "/completions"
    name = "text_completion"
    operation = "text_completion"
    fields = EVERYWHERE | SAMPLING | frozenset({"prompt", "suffix", "echo", "best_of"})
    set_fields = SET_FIELDS
    read_answer = staticmethod(read_choices)

    def written_anew(self, ask: Ask, bound: Bound, taken: Mapping[str, Any], upstream: Upstream) -> dict[str, object]:
        """The limit and the stream's options."""
        return limited(ask, bound, taken, upstream)

    def stream(self, ask: Ask, bound: Bound, rule: CountOutput) -> TextStream:
        """Chunks with text."""
        return TextStream(ask, bound, rule)

    def _read(self, body: dict[str, Any], model: str) -> Ask:
        prompts, least = count_prompts(body, "prompt")
        streamed = read_stream(body)
        return Ask(
            "text_completion",
            model,
            0,
            prompts=prompts,
            completions=max(whole(body, "n", 1, MAX_COMPLETIONS) or 1, whole(body, "best_of", 1, MAX_COMPLETIONS) or 1),
            least_input_tokens=least,
            # The API's own default of 16 is not every server's: the limit is always sent.
            max_tokens=whole(body, "max_tokens", 1) or 16,
            echo=boolean(body, "echo"),
            stream=streamed.stream,
            wants_usage=streamed.wants_usage,
            wants_running_usage=streamed.wants_running_usage,
        )
