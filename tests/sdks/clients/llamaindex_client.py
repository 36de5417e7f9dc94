"""A program on LlamaIndex. OPENAI_API_BASE and OPENAI_API_KEY say where, MODEL, PROMPT and MAX_TOKENS what.

It waits up to two minutes between attempts; here it says so, and goes on at once.
"""

import os
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI
from report import Saw, main, short_naps, usage_of

MESSAGES = [ChatMessage(role="user", content=os.environ["PROMPT"])]
model = OpenAI(model=os.environ["MODEL"], max_tokens=int(os.environ["MAX_TOKENS"]))


def chat(saw: Saw) -> None:
    with short_naps(0.05) as saw["naps"]:
        answer = model.chat(MESSAGES)
    saw["text"] = answer.message.content
    _look(saw, answer.raw)


def chat_stream(saw: Saw) -> None:
    with short_naps(0.05) as saw["naps"]:
        for answer in model.stream_chat(MESSAGES, stream_options={"include_usage": True}):
            saw["chunks"] += 1
            saw["text"] += answer.delta or ""
            _look(saw, answer.raw)


def _look(saw: Saw, raw: Any) -> None:
    for choice in raw.choices:
        saw["finish"] = choice.finish_reason or saw["finish"]
    if raw.usage:
        details = raw.usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        saw["usage"] = usage_of(raw.usage.prompt_tokens, raw.usage.completion_tokens, cached)
        saw["cost"] = ((raw.usage.model_extra or {}).get("credits") or {}).get("cost")


main({each.__name__: each for each in (chat, chat_stream)})
