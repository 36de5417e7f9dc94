"""POST /rerank: what documents may cost, and what an answer does."""

import json
from typing import Any

import pytest

from gateway.apis.registry import APIS
from gateway.domain.metered import Metered
from gateway.domain.request import Bound

API = APIS["/rerank"]


def bytes_of(*documents: Any) -> int | None:
    return API.read({"model": "m", "query": "q", "documents": list(documents)}).input_bytes


@pytest.mark.parametrize(
    "document", ["Hello", {"text": "Hello"}, {"id": 1, "title": "x", "text": "y", "image": None, "tags": []}]
)
def test_text_is_bounded_by_its_bytes(document: Any) -> None:
    assert bytes_of(document) == 0  # and the body's size will be added


@pytest.mark.parametrize(
    "document",
    [
        {"image": "https://example.com/a.png"},
        {"text": "Hello", "url": "https://example.com/a.png"},
        {"text": {"image": "aGVsbG8="}},
        {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]},
        {"from_the_future": "x"},
    ],
)
def test_anything_else_may_fill_the_context_window(document: Any) -> None:
    assert bytes_of("Hello", document) is None


def charged(**answer: Any) -> Metered:
    read = API.read_answer(json.dumps(answer).encode())
    assert read is not None
    ask = API.read({"model": "m", "query": "q", "documents": ["a"]}).of_size(40)
    return read.metered(ask, Bound(1000, 0, 0, units=ask.units))


@pytest.mark.parametrize(
    "shown", [{"results": [{"index": 0}]}, {"data": [0.5]}, {"scores": [0.5]}, {"results": {"0": 0.5}},
              {"results": [], "ranking": [0]}], ids=str
)  # fmt: skip
def test_an_answer_that_shows_anything_is_paid_whatever_its_shape(shown: dict[str, Any]) -> None:
    assert charged(**shown, usage={"total_tokens": 21}) == Metered(21, requests=1)
    assert charged(**shown) == Metered(10, requests=1)


@pytest.mark.parametrize("shown", [{}, {"results": []}, {"results": None, "data": []}], ids=str)
def test_an_answer_that_shows_nothing_is_free(shown: dict[str, Any]) -> None:
    assert charged(**shown, id="r", model="m", usage={"total_tokens": 21}) == Metered()
