"""What the gateway refuses: each SDK raises its own error, asks as often as it must, and no server hears of it."""

from tests.sdks.conftest import MANY, Outcome, Site
from tests.sdks.programs import Program, with_programs

#: An error's type, by its status, at OpenAI's endpoints and at Anthropic's.
TYPES = {
    401: ("invalid_request_error", "authentication_error"),
    402: ("insufficient_quota", "billing_error"),
    404: ("invalid_request_error", "not_found_error"),
    429: ("usage_limit_reached", "rate_limit_error"),
}
#: The longest that any of the SDKs sleeps until its next attempt.
MOST_NAP_S = 120


@with_programs(quick=())
def test_a_key_that_nobody_has(site: Site, program: Program) -> None:
    outcome = site.run(program, "llama", "whole", "stream", key="sk-qg-nobody")
    check(outcome, program, 401, "invalid_api_key")


@with_programs(quick=())
def test_a_model_that_nobody_sells(site: Site, program: Program) -> None:
    outcome = site.run(program, "llama", "whole", "stream", model="unknown")
    check(outcome, program, 404, "model_not_found")


@with_programs()
def test_no_credits_and_none_coming_is_asked_once(site: Site, program: Program) -> None:
    outcome = site.run(program, "llama", "whole", "stream", account=site.account("empty"))
    check(outcome, program, 402, "insufficient_quota")


@with_programs()
def test_an_allowance_that_is_spent_for_hours_is_asked_once_where_the_sdk_lets_itself_be_told(
    site: Site, program: Program
) -> None:
    account = site.account("tight")
    site.spend(account)
    outcome = site.run(program, "llama", "whole", account=account, max_tokens=MANY)
    check(outcome, program, 429, "insufficient_quota", attempts=program.attempts_when_spent)
    assert "spent until 2026-11-24T00:00:00Z" in (outcome.saw.error or {})["message"]
    assert all(nap <= MOST_NAP_S for nap in outcome.saw.naps)


def check(outcome: Outcome, program: Program, status: int, code: str, *, attempts: int = 1) -> None:
    """Each of the outcome's calls ended in the SDK's own error, after so many requests, of which none went on."""
    count = len(outcome.all_saw) * attempts
    assert outcome.statuses(count) == [status] * count
    assert (outcome.upstream, outcome.used) == ([], 0)
    for saw in outcome.all_saw:
        assert (saw.text, saw.finish) == ("", None)
        assert saw.error is not None
        assert (saw.error["class"], saw.error["status"]) == (program.raises[status], status)
        assert saw.error["type"] == TYPES[status][program.endpoint == "messages"]
        assert saw.error["code"] == (code if program.shows_code else None)
