"""A program on the openai SDK. OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL, PROMPT and MAX_TOKENS what."""

import os
from typing import Any

from openai import OpenAI
from report import Saw, main, usage_of

MODEL, PROMPT, MAX_TOKENS = os.environ["MODEL"], os.environ["PROMPT"], int(os.environ["MAX_TOKENS"])
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
client = OpenAI()


def chat(saw: Saw) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=MAX_TOKENS)
    answer = raw.parse()
    saw |= {"text": answer.choices[0].message.content, "finish": answer.choices[0].finish_reason}
    saw |= {"usage": _usage(answer.usage), "cost": raw.headers.get("x-credits-cost")}


def chat_stream(saw: Saw) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=MAX_TOKENS, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        saw["chunks"] += 1
        for choice in chunk.choices:
            saw["text"] += choice.delta.content or ""
            saw["finish"] = choice.finish_reason or saw["finish"]
        if chunk.usage:
            saw |= {
                "usage": _usage(chunk.usage),
                "cost": ((chunk.usage.model_extra or {}).get("credits") or {}).get("cost"),
            }


def completions(saw: Saw) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=MAX_TOKENS)
    answer = raw.parse()
    saw |= {"text": answer.choices[0].text, "finish": answer.choices[0].finish_reason}
    saw |= {"usage": _usage(answer.usage), "cost": raw.headers.get("x-credits-cost")}


def completions_stream(saw: Saw) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=MAX_TOKENS, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        saw["chunks"] += 1
        for choice in chunk.choices:
            saw["text"] += choice.text
            saw["finish"] = choice.finish_reason or saw["finish"]
        if chunk.usage:
            saw["usage"] = _usage(chunk.usage)
            saw["cost"] = ((chunk.usage.model_extra or {}).get("credits") or {}).get("cost")


def embeddings(saw: Saw) -> None:
    raw = client.embeddings.with_raw_response.create(model=MODEL, input=[PROMPT, "another"])
    answer = raw.parse()
    saw |= {"text": [item.embedding[:4] for item in answer.data], "cost": raw.headers.get("x-credits-cost")}
    saw["usage"] = usage_of(answer.usage.prompt_tokens, 0)


def responses(saw: Saw) -> None:
    raw = client.responses.with_raw_response.create(model=MODEL, input=PROMPT, max_output_tokens=MAX_TOKENS)
    answer = raw.parse()
    saw |= {"text": answer.output_text, "finish": answer.status, "cost": raw.headers.get("x-credits-cost")}
    saw["usage"] = _response_usage(answer.usage)


def responses_stream(saw: Saw) -> None:
    for event in client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=MAX_TOKENS, stream=True):
        saw["chunks"] += 1
        if event.type == "response.output_text.delta":
            saw["text"] += event.delta
        if event.type in ("response.completed", "response.incomplete", "response.failed"):
            saw |= {"finish": event.response.status, "usage": _response_usage(event.response.usage)}
            saw["cost"] = ((event.response.usage.model_extra or {}).get("credits") or {}).get("cost")


def _usage(usage: Any) -> dict[str, int] | None:
    details = usage.prompt_tokens_details
    return usage_of(usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details else 0)


def _response_usage(usage: Any) -> dict[str, int] | None:
    details = usage.input_tokens_details
    return usage_of(usage.input_tokens, usage.output_tokens, details.cached_tokens if details else 0)


doing = (chat, chat_stream, completions, completions_stream, embeddings, responses, responses_stream)
main({each.__name__: each for each in doing})
