"""Entries of a stream as the archive's rows: what the short way reads is what the careful one reads."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.credits.archive_rows import entry_of, ordinary_row, read_row, row_of
from gateway.credits.ledger import BrokenEntry, Entry, parse_entry

DAY = 86_400_000
ORDINARY = {
    "account": "zoë \n",
    "sequence": "4",
    "kind": "settle",
    "id": "rsv_10abc",
    "time": "1804681800123",
    "postings": f"window:{DAY} -70 used:{DAY} 70 balance -5 spent 5 unpaid -2 written_off 2",
    "used_after": f"{DAY}:170 3600000:0",
    "balance_after": "-495",
    "model": 'some/"model"',
    "key": "",
    "note": '{"price":"00c0ffee","tokens":{"input":20,"cached_input":10},"source":"chat – ☃"}',
}
#: Pieces that an odd value is made of.
PIECES = [
    *(
        "0",
        "7",
        "9" * 18,
        "-",
        "+",
        "_",
        ".",
        "e5",
        "٣",
        " ",
        "  ",
        ":",
        ",",
        "\0",
        "\n",
        "\\",
        '"',
        "{",
        "}",
        "[",
        "]",
    ),
    *("balance 1", "balance -1", "spent 07", "window:5 -0", "5:1", "05:01", '"price":', '"tokens":', '"source":'),
    *('"\\u0000"', '"\\ud800"', '"x"', '{"input":1,"input":2}', "NaN", "true", '"reason":"r"', "ü", "\x7f"),
]
ODD = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def words_of(fields: dict[str, str]) -> list[bytes]:
    return [word.encode() for pair in fields.items() for word in pair]


def read(words: Sequence[bytes]) -> Entry | str:
    try:
        return entry_of(read_row(16, b"18-0", words))
    except BrokenEntry as error:
        return str(error)


def parsed(words: Sequence[bytes]) -> Entry | str:
    try:
        return parse_entry(16, b"18-0", words)
    except BrokenEntry as error:
        return str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"used_after": "", "postings": "balance -5 spent 5", "key": "0123456789abcdef01234567"},
        {"note": '{"price":"","tokens":{},"source":""}', "balance_after": "0"},
    ],
)
def test_what_a_request_leaves_is_read_the_short_way_and_no_otherwise(changes: dict[str, str]) -> None:
    words = words_of(ORDINARY | changes)
    assert ordinary_row(16, b"18-0", words) == row_of(parse_entry(16, b"18-0", words))


@given(st.sampled_from(list(ORDINARY)), st.integers(0, 60), st.integers(0, 8), ODD)
@example("postings", 0, 999, "balance 1 balance -1")
@example("postings", 0, 999, "balance 007 spent -007")
@example("postings", 0, 999, "balance 1_0 spent +1")
@example("postings", 0, 999, "")
@example("used_after", 0, 999, "5:01")
@example("postings", 0, 999, "balance 1" + "0" * 18)
@example("used_after", 0, 999, "5:1 5:2")
@example("time", 0, 999, "253402300800000")
@example("note", 0, 999, '{"price":"\n","tokens":{},"source":""}')
@example("note", 0, 999, '{"price":"\\u0000","tokens":{},"source":""}')
@example("note", 0, 999, '{"price":"1","tokens":{"input":1,"input":2},"source":""}')
@example("note", 0, 999, '{"price":"1","tokens":{"input":' + "9" * 30 + '},"source":""}')
def test_an_odd_value_is_read_as_the_careful_way_reads_it(name: str, at: int, instead_of: int, odd: str) -> None:
    text = ORDINARY[name]
    words = words_of(ORDINARY | {name: text[:at] + odd + text[at + instead_of :]})
    assert read(words) == parsed(words)


@given(st.integers(0, 21), st.integers(0, 21), st.sampled_from([b"\xff", b"", b"kind", b"7", b"a\0b"]))
def test_odd_words_are_read_as_the_careful_way_reads_them(first: int, second: int, odd: bytes) -> None:
    words = words_of(ORDINARY)
    words[first], words[second] = words[second], odd
    for some in (words, words[:first], words + words[second:]):
        assert read(some) == parsed(some)


def test_members_that_no_request_leaves_are_kept() -> None:
    note = {"price": "1", "tokens": {"input": 2}, "source": "chat", "answered_by": "other/model"}
    entry = entry_of(read_row(16, b"18-0", words_of(ORDINARY | {"note": json.dumps(note)})))
    assert (entry.price_version, entry.tokens, entry.source) == ("1", {"input": 2}, "chat")
    assert entry.extra == {"note": {"answered_by": "other/model"}}
