"""What each SDK gets through the gateway is what it gets from the server itself, and costs what the server counted."""

import json
from decimal import Decimal

import pytest

from tests.gateway_process import cost_of
from tests.sdks.conftest import PATHS, Site
from tests.sdks.counting import Arrived
from tests.sdks.programs import COMPLETIONS, COUNTING, EMBEDDINGS, Program, Saw, with_servers


@with_servers(PATHS, quick=("llama", "llmock"))
def test_an_answer_is_the_servers_own_at_its_price(site: Site, program: Program, server: str) -> None:
    direct = site.run_direct(program, server, "whole", "stream")
    outcome = site.run(program, server, "whole", "stream")
    whole, stream = outcome.all_saw
    assert [(saw.text, saw.finish, saw.error) for saw in outcome.all_saw] == [
        (saw.text, saw.finish, None) for saw in direct
    ]
    assert stream.chunks >= direct[1].chunks > 1
    assert outcome.statuses(2) == [200, 200]
    assert [bool(arrived.body.get("stream")) for arrived in outcome.upstream] == [False, True]
    costs = [_cost(whole, direct[0])]
    # fakellm says no usage on such a stream: the documented estimate is charged, and told in a usage of the gateway's.
    silent = server == "fakellm" and program.endpoint == "chat"
    costs.append(_estimated(stream, outcome.upstream[1]) if silent else _cost(stream, direct[1]))
    assert outcome.used == sum(costs)
    shown = [call in program.shows_cost for call in ("whole", "stream")]
    assert [Decimal(saw.cost) if saw.cost else None for saw in outcome.all_saw] == [
        costs[0] if shown[0] else None,
        costs[1] if shown[1] else None,
    ]


@pytest.mark.long
@pytest.mark.parametrize("server", ["llama", "mockai"])
def test_completions_cost_their_usage(site: Site, server: str) -> None:
    direct = site.run_direct(COMPLETIONS, server, "whole", "stream")
    outcome = site.run(COMPLETIONS, server, "whole", "stream")
    assert [(saw.text, saw.finish, saw.error) for saw in outcome.all_saw] == [
        (saw.text, saw.finish, None) for saw in direct
    ]
    costs = [_cost(saw, there) for saw, there in zip(outcome.all_saw, direct, strict=True)]
    assert [Decimal(saw.cost or 0) for saw in outcome.all_saw] == costs
    assert outcome.used == sum(costs)


@pytest.mark.long
@pytest.mark.parametrize("server", ["llama-embedding", "mockai"])
def test_embeddings_cost_their_usage(site: Site, server: str) -> None:
    (direct,) = site.run_direct(EMBEDDINGS, server, "whole")
    outcome = site.run(EMBEDDINGS, server, "whole")
    assert (outcome.saw.text, outcome.saw.error) == (direct.text, None)
    assert outcome.used == _cost(outcome.saw, direct) == Decimal(outcome.saw.cost or 0)


@pytest.mark.long
@pytest.mark.parametrize("server", ["llama", "mockai-anthropic"])
def test_counting_tokens_is_free(site: Site, server: str) -> None:
    (direct,) = site.run_direct(COUNTING, server, "whole")
    outcome = site.run(COUNTING, server, "whole")
    assert (outcome.saw, outcome.saw.error) == (direct, None)
    assert outcome.saw.usage is not None
    assert outcome.saw.usage["input"] > 0
    assert outcome.used == 0


def _cost(saw: Saw, direct: Saw) -> Decimal:
    """The price of the usage that it saw, which must be the server's; what is cached depends on what came before."""
    assert saw.usage is not None
    assert direct.usage is not None
    assert {**saw.usage, "cached": 0} == {**direct.usage, "cached": 0}
    return cost_of(saw.usage["input"], saw.usage["output"], saw.usage["cached"])


def _estimated(saw: Saw, arrived: Arrived) -> Decimal:
    """The price of a token per four bytes of the request, and of the text or per event if those are more."""
    limits = ("max_tokens", "max_completion_tokens", "stream_options")
    asked = {name: value for name, value in arrived.body.items() if name not in limits}
    size = len(json.dumps(asked, separators=(",", ":"), ensure_ascii=False).encode())
    return cost_of(-(-size // 4), max(saw.text.count(" ") + 1, -(-len(saw.text) // 4)))
