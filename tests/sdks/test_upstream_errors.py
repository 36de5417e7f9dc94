"""What goes wrong behind the gateway: each SDK repeats by its own rules, the gateway adds nothing, and nothing is
charged."""

import pytest

from tests.sdks.conftest import NOBODY, Outcome, Site
from tests.sdks.programs import QUICK, Program, with_programs
from tests.sdks.third_party import Llmock

#: Events until a stream's fault: behind the first text.
SOME = 5


@with_programs(quick=QUICK[:1])
def test_a_server_that_fails_gets_each_attempt_once(site: Site, llmock: Llmock, program: Program) -> None:
    llmock.will("fail", status=500)
    check_attempts(site.run(program, "llmock", "whole"), program, 500)
    # More than ten attempts it calls a storm: those of LlamaIndex are many, and all its own.
    assert llmock.verdict() == (["retry_storm"] if program.attempts > 10 else [])


@with_programs(quick=())
def test_a_server_that_is_busy_is_given_the_time_that_it_asks_for(site: Site, llmock: Llmock, program: Program) -> None:
    llmock.will("fail", status=429, retry_after=1)
    outcome = site.run(program, "llmock", "whole")
    check_attempts(outcome, program, 429)
    # What it finds would be attempts before the second was over, or too many of them. One program is spared its waits.
    assert outcome.saw.naps or llmock.verdict() == []


@with_programs(quick=())
def test_another_server_that_fails_gets_each_attempt_once(site: Site, program: Program) -> None:
    server = "mockai-anthropic" if program.endpoint == "messages" else "mockai"
    outcome = site.run(program, server, "whole", model=f"{server}-{program.endpoint}-500")
    check_attempts(outcome, program, 500)


@with_programs(quick=())
def test_a_server_that_is_not_there_is_no_fault_of_the_clients(site: Site, program: Program) -> None:
    outcome = site.run(program, NOBODY, "whole")
    assert outcome.statuses(program.attempts) == [502] * program.attempts
    check_error(outcome, program, 502)


@with_programs()
@pytest.mark.parametrize("fault", ["truncate", "disconnect"])
def test_a_broken_stream_is_an_error_and_free(site: Site, llmock: Llmock, program: Program, fault: str) -> None:
    """Of a stream that breaks off without a sound most SDKs think that it has ended."""
    llmock.will("stream_fault", kind=fault, after_chunks=SOME)
    outcome = site.run(program, "llmock", "stream")
    assert len(outcome.logged(1)) == len(outcome.upstream) == 1
    assert outcome.saw.text
    check_error(outcome, program, None)


@with_programs(quick=(), endpoint="messages")
def test_a_server_that_says_an_error_in_its_stream(site: Site, program: Program) -> None:
    outcome = site.run(program, "mockai-anthropic", "stream", model="mockai-anthropic-messages-stream")
    assert len(outcome.logged(1)) == len(outcome.upstream) == 1
    assert outcome.saw.error is not None
    assert "Mock streaming failure" in outcome.saw.error["message"]
    assert outcome.used == 0


def check_attempts(outcome: Outcome, program: Program, status: int) -> None:
    """The gateway and the server saw as many requests as the SDK makes of its own accord, and said the same to each."""
    answers = [status] * program.attempts
    assert outcome.statuses(program.attempts) == answers
    assert [arrived.status for arrived in outcome.upstream] == answers
    check_error(outcome, program, status)


def check_error(outcome: Outcome, program: Program, status: int | None) -> None:
    """It ended in the SDK's own error, and costs nothing."""
    assert outcome.saw.error is not None
    assert outcome.saw.error["class"] == program.raises[status]
    assert outcome.saw.finish is None
    assert outcome.used == 0
