"""Credits that end in the middle of a stream: each SDK sees a shorter answer that ended well, and then is refused."""

import pytest

from tests.sdks.conftest import MANY, SHARED, TIGHT, Outcome, Site
from tests.sdks.programs import Program, Saw, takes, with_programs
from tests.sdks.third_party import Llmock

#: Less than it takes to begin another answer.
REST = TIGHT / 5
#: What llmock is told to say: so many words, each an event.
WORDS = " ".join(f"w{number}" for number in range(1000))


@with_programs()
def test_credits_that_end_before_the_answer(site: Site, program: Program) -> None:
    """The server is told to stop where they end."""
    if not takes(program, "llama"):
        pytest.skip("it does not understand llama.cpp's events")
    (direct,) = site.run_direct(program, "llama", "stream", max_tokens=MANY)
    outcome = site.run(program, "llama", "stream", "whole", account=site.account("tight"), max_tokens=MANY)
    stream, refused = outcome.all_saw
    check_shorter(stream, direct)
    # llama.cpp says of every response that it is complete, whatever ended it.
    assert stream.finish == direct.finish
    assert stream.finish == program.length or program.endpoint == "responses"
    assert TIGHT - REST < outcome.used <= TIGHT
    assert outcome.statuses(1 + program.attempts_when_spent) == [200, *[429] * program.attempts_when_spent]
    assert outcome.logged(1)[0]["cost"] == f"{outcome.used:f}"
    assert len(outcome.upstream) == 1
    assert refused.error is not None
    assert (refused.error["class"], refused.error["status"]) == (program.raises[429], 429)


@with_programs(quick=())
def test_credits_that_another_stream_holds(site: Site, llmock: Llmock, program: Program) -> None:
    """The gateway ends the answer where it can hold nothing more for it, and says so as its server would."""
    llmock.will("reply", text=WORDS)
    server = "llama" if takes(program, "llama") else "llmock"
    (direct,) = site.run_direct(program, server, "stream", max_tokens=MANY)
    account = site.account("shared")
    with site.holding(account):
        outcome = site.run(program, server, "stream", account=account, max_tokens=MANY, held=True)
        check_shorter(outcome.saw, direct)
        assert outcome.saw.finish == program.length
        check_cut_by_credits(outcome)


@with_programs(quick=())
def test_a_server_that_goes_on_where_credits_end(site: Site, llmock: Llmock, program: Program) -> None:
    """One that does not heed its limit is stopped: a shorter answer to each SDK, charged with all there was."""
    llmock.will("reply", text=WORDS)
    outcome = site.run(program, "llmock", "stream", account=site.account("tight"), max_tokens=MANY)
    assert outcome.saw.error is None
    assert outcome.saw.finish == program.length
    assert outcome.saw.text
    assert WORDS.startswith(outcome.saw.text)
    assert len(outcome.saw.text) < len(WORDS)
    assert TIGHT - REST < outcome.used <= TIGHT
    assert len(outcome.upstream) == 1


def check_shorter(saw: Saw, direct: Saw) -> None:
    """It is the beginning of what the server says, and no error."""
    assert (saw.error, direct.error) == (None, None)
    assert 1 < saw.chunks < direct.chunks
    assert 0 < len(saw.text) < len(direct.text)
    assert direct.text.startswith(saw.text)


def check_cut_by_credits(outcome: Outcome) -> None:
    """The gateway ended it, and took no more than there was beside the other stream's hold."""
    (line,) = outcome.logged(1)
    assert (line["status"], line["reason"]) == (200, "credits_exhausted")
    assert line["cost"] == f"{outcome.used:f}"
    assert 0 < outcome.used <= SHARED - outcome.funds.held
    assert outcome.funds.used + outcome.funds.held + outcome.funds.remaining == SHARED
