"""A program on the anthropic SDK. ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY say where, MODEL, PROMPT and MAX_TOKENS
what."""

import os
from typing import Any

from anthropic import Anthropic
from report import Saw, main, usage_of

ASKED: Any = {
    "model": os.environ["MODEL"],
    "max_tokens": int(os.environ["MAX_TOKENS"]),
    "messages": [{"role": "user", "content": os.environ["PROMPT"]}],
}
client = Anthropic()


def messages(saw: Saw) -> None:
    raw = client.messages.with_raw_response.create(**ASKED)
    answer = raw.parse()
    saw |= {"text": "".join(block.text for block in answer.content), "finish": answer.stop_reason}
    saw |= {"usage": _usage(answer.usage), "cost": raw.headers.get("x-credits-cost")}


def messages_stream(saw: Saw) -> None:
    with client.messages.stream(**ASKED) as stream:
        for event in stream:
            saw["chunks"] += 1
            if event.type == "text":
                saw["text"] += event.text
            if event.type == "message_delta":
                saw["cost"] = ((event.usage.model_extra or {}).get("credits") or {}).get("cost")
        answer = stream.get_final_message()
    saw |= {"finish": answer.stop_reason, "usage": _usage(answer.usage)}


def messages_count_tokens(saw: Saw) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    saw["usage"] = usage_of(client.messages.count_tokens(**asked).input_tokens, 0)


def _usage(usage: Any) -> dict[str, int]:
    cached = usage.cache_read_input_tokens or 0
    return usage_of(usage.input_tokens + cached, usage.output_tokens, cached)


main({each.__name__: each for each in (messages, messages_stream, messages_count_tokens)})
