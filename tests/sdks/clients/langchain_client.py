"""A program on LangChain. OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL, PROMPT and MAX_TOKENS what."""

import os

from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from report import Saw, main, usage_of

MODEL, PROMPT, MAX_TOKENS = os.environ["MODEL"], os.environ["PROMPT"], int(os.environ["MAX_TOKENS"])


def chat(saw: Saw) -> None:
    _invoke(saw, ChatOpenAI(model=MODEL, max_tokens=MAX_TOKENS))


def chat_stream(saw: Saw) -> None:
    _stream(saw, ChatOpenAI(model=MODEL, max_tokens=MAX_TOKENS, stream_usage=True))


def responses(saw: Saw) -> None:
    _invoke(saw, ChatOpenAI(model=MODEL, max_tokens=MAX_TOKENS, use_responses_api=True))


def responses_stream(saw: Saw) -> None:
    _stream(saw, ChatOpenAI(model=MODEL, max_tokens=MAX_TOKENS, use_responses_api=True))


def _invoke(saw: Saw, model: ChatOpenAI) -> None:
    answer = model.invoke(PROMPT)
    saw["text"] = answer.text
    _look(saw, answer)


def _stream(saw: Saw, model: ChatOpenAI) -> None:
    whole = None
    for chunk in model.stream(PROMPT):
        saw["chunks"] += 1
        saw["text"] += chunk.text
        whole = chunk if whole is None else whole + chunk
    if isinstance(whole, AIMessage):
        _look(saw, whole)


def _look(saw: Saw, answer: AIMessage) -> None:
    said = answer.response_metadata
    saw["finish"] = said.get("finish_reason") or said.get("status")
    if usage := answer.usage_metadata:
        cached = usage.get("input_token_details", {}).get("cache_read")
        saw["usage"] = usage_of(usage["input_tokens"], usage["output_tokens"], cached)
    saw["cost"] = ((said.get("token_usage") or {}).get("credits") or {}).get("cost")


main({each.__name__: each for each in (chat, chat_stream, responses, responses_stream)})
