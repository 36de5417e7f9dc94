"""Endpoints besides the streaming ones: rerank, those that are free, and what browsers ask first.

No server that could be had here reranks or moderates: the upstream is a stand-in that answers in their forms.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from aiohttp import web

from tests.acceptance.conftest import Answer, ask, funds_of, new_account
from tests.gateway_process import Gateway, cost_of, gateway_config, running_gateway
from tests.upstreams.local import LocalUpstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "ranker"
ALIAS = "best-ranker"
BY_REQUEST = "ranker-by-units"
ELSEWHERE = "ranker-elsewhere"
MODERATION = "omni-moderation-latest"
ORIGIN = {"Origin": "https://app.example.com"}


class Desk(LocalUpstream):
    """Says of each request what ``says`` holds for its path. requests: what came."""

    def __init__(self) -> None:
        super().__init__(web.post("/v1/{path:.*}", self._answer))
        self.says: dict[str, tuple[int, Any]] = {}
        self.requests: list[tuple[str, Any, list[str]]] = []

    async def _answer(self, request: web.Request) -> web.Response:
        path = f"/{request.match_info['path']}"
        keys = [request.headers[name] for name in ("Authorization", "x-api-key", "token") if name in request.headers]
        self.requests.append((path, await request.json(), keys))
        status, document = self.says[path]
        return web.json_response(document, status=status)


@dataclass
class Bench:
    gateway: Gateway
    desk: Desk
    session: aiohttp.ClientSession
    keys: dict[str, str] = field(default_factory=dict)

    async def ask(self, path: str, body: dict[str, Any], *, status: int = 200, says: Any = None) -> Answer:
        """As the account that has credits, unless the upstream's answer is not needed."""
        self.desk.says[path] = (status, says)
        return await ask(self.session, self.gateway, str(self.gateway.key), json.dumps(body).encode(), path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    data_dir = tmp_path_factory.mktemp("endpoints") / "data"
    async with Desk() as desk, aiohttp.ClientSession() as session:
        config = gateway_config(desk.base_url, [MODEL, MODERATION])
        config["upstreams"]["test"]["api_key"] = "upstream-key"
        config["models"]["models"][ALIAS] = {**config["models"]["models"][MODEL], "upstream_model": "the/real-one"}
        config["upstreams"]["other"] = {**config["upstreams"]["test"], "key_header": "x-api-key"}
        config["models"]["models"][ELSEWHERE] = {**config["models"]["models"][MODEL], "upstream": "other"}
        config["models"]["models"][BY_REQUEST] = {"upstream": "test", "request_price": "0.002"}
        with running_gateway(config, data_dir=data_dir) as gateway:
            yield Bench(gateway, desk, session)


def rerank_body(documents: list[Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "query": "Which is best?", "documents": documents, **fields}


RANKS = [{"index": 0, "relevance_score": 0.9}]


@pytest.mark.parametrize(
    "said",
    [{"usage": {"total_tokens": 21}}, {"usage": {"prompt_tokens": 21, "total_tokens": 21}},
     {"meta": {"billed_units": {"input_tokens": 21}}}],
    ids=["vllm", "jina", "cohere"],
)  # fmt: skip
async def test_a_rerank_is_charged_by_its_tokens(bench: Bench, said: dict[str, Any]) -> None:
    answer = await bench.ask("/rerank", rerank_body(["a", {"text": "b"}], top_n=1), says={"results": RANKS, **said})
    assert (answer.status, answer.document) == (200, {"results": RANKS, **said})
    assert answer.cost == cost_of(21, 0)
    path, body, key = bench.desk.requests[-1]
    assert (path, body, key) == ("/rerank", rerank_body(["a", {"text": "b"}], top_n=1), ["Bearer upstream-key"])


async def test_a_rerank_holds_the_query_with_each_document(bench: Bench) -> None:
    documents = ["x" * 100] * 10
    body = rerank_body(documents, query="q" * 1000)
    answer = await bench.ask("/rerank", body, says={"results": RANKS, "usage": {"total_tokens": 10**9}})
    held = Decimal(answer.headers["x-credits-reserved"])
    size = len(json.dumps(body, separators=(",", ":")).encode())
    assert held == cost_of(size + 9 * 1000 + 10 * 256, 0)
    assert answer.cost == held  # whatever the upstream says


async def test_a_rerank_without_usage_is_charged_by_its_bytes(bench: Bench) -> None:
    body = rerank_body(["a", "b"])
    answer = await bench.ask("/rerank", body, says={"results": RANKS})
    assert answer.cost == cost_of(-(-len(json.dumps(body, separators=(",", ":")).encode()) // 4), 0)
    assert (await bench.ask("/rerank", body, says={"results": []})).cost == 0


async def test_a_rerank_may_be_priced_by_its_search_units(bench: Bench) -> None:
    """A unit is 100 documents; the upstream says how many it took, never more than the documents can be."""
    body = rerank_body(["x"] * 101) | {"model": BY_REQUEST}
    for said, units in (({}, 2), ({"search_units": 1}, 1), ({"search_units": 0}, 1), ({"search_units": 10**9}, 2)):
        answer = await bench.ask("/rerank", body, says={"results": RANKS, "meta": {"billed_units": said}})
        assert answer.cost == units * Decimal("0.002")
        assert Decimal(answer.headers["x-credits-reserved"]) == Decimal("0.004")


async def test_a_model_may_have_another_name_at_its_upstream(bench: Bench) -> None:
    says = {"results": RANKS, "usage": {"total_tokens": 5}}
    answer = await bench.ask("/rerank", rerank_body(["a"]) | {"model": ALIAS}, says=says)
    assert answer.cost == cost_of(5, 0)
    assert bench.desk.requests[-1][1]["model"] == "the/real-one"
    await bench.ask("/moderations", {"model": ALIAS, "input": "x"}, says={"results": []})
    assert bench.desk.requests[-1][1] == {"model": "the/real-one", "input": "x"}


async def test_an_upstream_gets_its_own_key_where_it_looks_for_it(bench: Bench) -> None:
    says = {"results": RANKS, "usage": {"total_tokens": 5}}
    assert (await bench.ask("/rerank", rerank_body(["a"]) | {"model": ELSEWHERE}, says=says)).status == 200
    assert bench.desk.requests[-1][2] == ["upstream-key"]


async def test_a_model_is_sold_only_where_it_has_a_price(bench: Bench) -> None:
    body = {"model": BY_REQUEST, "messages": [{"role": "user", "content": "Hello!"}]}
    answer = await bench.ask("/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("change", "param"),
    [({"query": None}, "query"), ({"query": 5}, "query"), ({"documents": []}, "documents"),
     ({"documents": ["x"] * 2049}, "documents"), ({"documents": ["a", 7]}, "documents[1]"), ({"secret": 1}, "secret")],
    ids=str,
)  # fmt: skip
async def test_a_rerank_that_cannot_be_priced_is_refused(bench: Bench, change: dict[str, Any], param: str) -> None:
    seen = len(bench.desk.requests)
    answer = await bench.ask("/rerank", rerank_body(["a"]) | change)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert len(bench.desk.requests) == seen


@pytest.mark.parametrize("path", ["/moderations", "/responses/input_tokens", "/messages/count_tokens"])
async def test_what_is_free_needs_a_key_and_a_model_and_no_credits(bench: Bench, path: str) -> None:
    bench.desk.says[path] = (200, {"input_tokens": 7})
    poor = bench.keys.setdefault(path, new_account(bench.gateway, path[1:].replace("/", "-"), "standard"))
    before = funds_of(bench.gateway)
    body = {"model": MODEL, "input": "x", "anything": {"goes": True}}
    answer = await ask(bench.session, bench.gateway, poor, json.dumps(body).encode(), path)
    assert (answer.status, answer.document) == (200, {"input_tokens": 7})
    assert answer.headers["x-request-id"].startswith("req_")
    assert not [name for name in answer.headers if name.lower().startswith("x-credits")]
    assert bench.desk.requests[-1] == (path, body, ["Bearer upstream-key"])
    assert funds_of(bench.gateway) == before

    seen = len(bench.desk.requests)
    assert (await ask(bench.session, bench.gateway, "sk-nobody-has-this", b"{}", path)).status == 401
    unknown = await bench.ask(path, {"model": "nobody"})
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    assert len(bench.desk.requests) == seen


async def test_what_is_free_means_the_same_on_both_sides(bench: Bench) -> None:
    bench.desk.says["/moderations"] = (200, {"results": []})
    body = f'{{"model": "a/dear-one", "model": "{MODEL}", "input": "x"}}'.encode()
    assert (await ask(bench.session, bench.gateway, str(bench.gateway.key), body, "/moderations")).status == 200
    assert bench.desk.requests[-1][1] == {"model": MODEL, "input": "x"}


@pytest.mark.parametrize("path", ["/moderations", "/messages"])
async def test_what_is_nested_too_deeply_to_be_written_is_refused(bench: Bench, path: str) -> None:
    deep = "[" * 300 + "]" * 300
    thinking = f'"thinking": {{"type": "disabled", "x": {deep}}}'
    said = f'"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 5, {thinking}'
    body = f'{{"model": "{MODEL}", {said}}}'.encode()
    answer = await ask(bench.session, bench.gateway, str(bench.gateway.key), body, path)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


async def test_the_sdk_moderates_without_naming_a_model(bench: Bench) -> None:
    result = {"flagged": False, "categories": {}, "category_scores": {}, "category_applied_input_types": {}}
    bench.desk.says["/moderations"] = (200, {"id": "modr-1", "model": MODERATION, "results": [result]})
    async with openai.AsyncOpenAI(api_key=str(bench.gateway.key), base_url=bench.gateway.base_url) as client:
        answer = await client.moderations.create(input="Hello!")
    assert not answer.results[0].flagged
    assert bench.desk.requests[-1][1] == {"input": "Hello!"}


@pytest.mark.parametrize("model", ["", 0, False, {}, []], ids=repr)
async def test_what_is_no_model_is_not_taken_for_the_usual_one(bench: Bench, model: Any) -> None:
    seen = len(bench.desk.requests)
    answer = await bench.ask("/moderations", {"model": model, "input": "x"}, says={"results": []})
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert len(bench.desk.requests) == seen


async def test_an_upstreams_refusal_of_what_is_free_is_passed_on(bench: Bench) -> None:
    answer = await bench.ask(
        "/moderations", {"model": MODEL, "input": 5}, status=400, says={"error": {"message": "input must be text"}}
    )
    assert (answer.status, answer.error["message"]) == (400, "input must be text")


# --- browsers -------------------------------------------------------------------------------------------------------


async def test_a_page_may_send_a_request_and_read_its_answer(bench: Bench) -> None:
    url = f"{bench.gateway.base_url}/rerank"
    asks = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-a"}
    async with bench.session.options(url, headers=asks) as answer:
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization,x-a"

    bench.desk.says["/rerank"] = (200, {"results": RANKS, "usage": {"total_tokens": 3}})
    for key, status in ((str(bench.gateway.key), 200), ("sk-nobody-has-this", 401)):
        headers = {**ORIGIN, "Authorization": f"Bearer {key}"}
        async with bench.session.post(url, json=rerank_body(["a"]), headers=headers) as answer:
            assert answer.status == status
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["Access-Control-Expose-Headers"] == "*"
    async with bench.session.post(url, json=rerank_body(["a"])) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_who_looks_whether_anybody_is_there_finds_somebody(bench: Bench) -> None:
    root = bench.gateway.base_url.removesuffix("/v1")
    async with bench.session.head(f"{root}/") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with bench.session.get(f"{root}/") as answer:
        assert await answer.json() == {"name": "quota-gateway"}
