"""The head of a request to an upstream says what its own client said, whoever asked before."""

import random

from multidict import CIMultiDict, CIMultiDictProxy

from gateway.config.model import Secret, Upstream
from gateway.upstream.headers import Head

UPSTREAM = Upstream("up", "http://up.test/v1", Secret("k"))
NAMES = ["Accept", "accept", "User-Agent", "anthropic-beta", "Anthropic-Beta", "openai-beta", "traceparent", "Cookie"]


def said(*headers: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(headers))


def test_a_header_that_came_twice_does_not_reach_who_sends_it_once() -> None:
    head = Head(UPSTREAM)
    twice = head.written("POST", "/x", said(("anthropic-beta", "a"), ("anthropic-beta", "b")), b"{}")
    once = head.written("POST", "/x", said(("anthropic-beta", "a")), b"{}")
    assert twice.count(b"anthropic-beta: ") == 2
    assert once.count(b"anthropic-beta: ") == 1


def test_nor_is_one_of_two_lost_after_who_sends_it_once() -> None:
    head = Head(UPSTREAM)
    head.written("POST", "/x", said(("anthropic-beta", "a")), b"{}")
    twice = head.written("POST", "/x", said(("anthropic-beta", "a"), ("anthropic-beta", "b")), b"{}")
    assert b"anthropic-beta: b\r\n" in twice


def test_it_is_what_it_would_be_had_nobody_asked_before() -> None:
    rng, head = random.Random(1), Head(UPSTREAM)
    for _ in range(3000):
        headers = said(*[(rng.choice(NAMES), rng.choice("ab")) for _ in range(rng.randrange(5))])
        assert head.written("POST", "/x", headers, b"{}") == Head(UPSTREAM).written("POST", "/x", headers, b"{}")


def test_names_that_take_much_memory_are_not_remembered() -> None:
    head = Head(UPSTREAM)
    for number in range(10):
        head.written("POST", "/x", said(*[(f"x-{number}-{'x' * 900}-{i}", "") for i in range(3)]), b"{}")
    assert not head._customs
