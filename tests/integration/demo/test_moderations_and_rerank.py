"""What judges texts: the demo model flags nothing, and ranks by words."""

from typing import Any

import aiohttp
import openai
import pytest

from gateway.demo.upstream import DemoUpstream
from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL

QUERY = "deep sea trench"
DOCUMENTS = ["A recipe for bread", "The trench is deep", {"text": "Deep in the sea is a trench"}]


@pytest.mark.parametrize(
    ("given", "results"),
    [("one", 1), (["one", "two"], 2), ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], 1)],
)
async def test_moderations_flag_nothing(client: openai.AsyncOpenAI, given: Any, results: int) -> None:
    answer = await client.moderations.create(model=MODEL, input=given)
    assert answer.model == MODEL and len(answer.results) == results
    for result in answer.results:
        assert not result.flagged
        assert set(result.categories.to_dict().values()) == {False}
        assert set(result.category_scores.to_dict().values()) == {0.0}
        assert result.category_applied_input_types.self_harm_intent == ["text"]


async def test_a_moderation_needs_no_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.moderations.create(input="one")
    assert (answer.model, len(answer.results)) == ("omni-moderation-latest", 1)


@pytest.mark.parametrize("given", [[], 5, [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]])
async def test_what_cannot_be_moderated_is_refused(client: openai.AsyncOpenAI, given: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.moderations.create(model=MODEL, input=given)
    assert refused.value.param == "input"


async def reranked(upstream: DemoUpstream, **fields: Any) -> tuple[int, Any]:
    body = {"model": MODEL, "query": QUERY, "documents": DOCUMENTS} | fields
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{upstream.base_url}/rerank", json=body) as response,
    ):
        return response.status, await response.json()


async def test_documents_come_in_the_order_of_their_words(upstream: DemoUpstream) -> None:
    status, answer = await reranked(upstream)
    assert status == 200
    assert [(result["index"], result["relevance_score"]) for result in answer["results"]] == [
        (2, 1.0),
        (1, 0.666667),
        (0, 0.0),
    ]
    texts = [QUERY] * 3 + ["A recipe for bread", "The trench is deep", "Deep in the sea is a trench"]
    assert answer["usage"]["total_tokens"] == sum(len(split_tokens(text)) for text in texts)
    assert answer["meta"]["billed_units"] == {"search_units": 1}


async def test_the_best_alone_with_their_text_and_a_unit_per_hundred(upstream: DemoUpstream) -> None:
    _, answer = await reranked(upstream, documents=DOCUMENTS * 34, top_n=1, return_documents=True)
    [best] = answer["results"]
    assert best["document"] == {"text": "Deep in the sea is a trench"}
    assert answer["meta"]["billed_units"] == {"search_units": 2}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": [5]}, "documents"),
        ({"top_n": 0}, "top_n"),
    ],
)
async def test_what_cannot_be_ranked_is_refused(upstream: DemoUpstream, fields: dict[str, Any], param: str) -> None:
    status, answer = await reranked(upstream, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
