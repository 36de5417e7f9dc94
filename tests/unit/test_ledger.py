"""Entries as a stream holds them, and their sum."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway.credits.ledger import MOST_MISMATCHES, BrokenEntry, Entry, Fold, parse_entry, parse_hold, parse_live

DAY = 86_400_000
NOTE = {"price": "00c0ffee", "tokens": {"input": 20, "output": 10}, "source": "chat"}
SETTLED = {
    "account": "alice",
    "sequence": "4",
    "kind": "settle",
    "id": "rsv_10abc",
    "time": "1804681800123",
    "postings": f"window:{DAY} -70 used:{DAY} 70 balance -5 spent 5 unpaid -2 written_off 2",
    "used_after": f"{DAY}:170 3600000:9",
    "balance_after": "495",
    "model": "some/model",
    "key": "0123456789abcdef01234567",
    "note": json.dumps(NOTE),
}


def parsed(without: Sequence[str] = (), **changes: str | bytes) -> Entry:
    fields = {name: text for name, text in (SETTLED | changes).items() if name not in without}
    words = [word if isinstance(word, bytes) else word.encode() for pair in fields.items() for word in pair]
    return parse_entry(16, b"1804681800123-0", words)


def test_an_entry_as_the_scripts_write_it() -> None:
    entry = parsed()
    assert (entry.shard, entry.stream_id) == (16, "1804681800123-0")
    assert (entry.account, entry.sequence, entry.kind, entry.id) == ("alice", 4, "settle", "rsv_10abc")
    assert entry.time_ms == 1804681800123
    assert entry.postings[f"window:{DAY}"] == -70 and entry.postings["spent"] == 5
    assert (entry.used_after, entry.balance_after_nano) == ({DAY: 170, 3_600_000: 9}, 495)
    assert (entry.plan, entry.model, entry.key) == ("", "some/model", "0123456789abcdef01234567")
    assert (entry.price_version, entry.source, entry.reason) == ("00c0ffee", "chat", "")
    assert (entry.tokens, entry.extra) == ({"input": 20, "output": 10}, {})


def test_an_entry_that_moves_nothing() -> None:
    entry = parsed(["note", "model", "key"], postings="", used_after="", plan="payg", kind="open")
    assert (entry.postings, entry.used_after, entry.plan, entry.tokens) == ({}, {}, "payg", {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sequence": "0x10"}, "'0x10' is not a whole number"),
        ({"sequence": "1e3"}, "'1e3' is not a whole number"),
        ({"sequence": "9" * 19}, f"'{'9' * 19}' is not a whole number"),
        ({"sequence": "٣"}, "'٣' is not a whole number"),
        ({"time": "-1"}, "'-1' is not a time"),
        ({"time": "9" * 18}, f"'{'9' * 18}' is not a time"),
        ({"postings": "balance 1 spent"}, "argument 2 is shorter than argument 1"),
        ({"postings": "balance 1 balance -1"}, "a book is in its postings twice"),
        ({"postings": "balance  1"}, "argument 2 is shorter"),
        ({"used_after": "70"}, "'' is not a whole number"),
        ({"balance_after": ""}, "'' is not a whole number"),
        ({"model": "a\0b"}, "a NUL character is in it"),
        ({"id": b"\xff"}, "can't decode byte 0xff"),
    ],
)
def test_an_entry_that_cannot_be_read_says_why_and_loses_nothing(changes: dict[str, str | bytes], reason: str) -> None:
    with pytest.raises(BrokenEntry) as broken:
        parsed(**changes)
    assert str(broken.value).startswith("entry 1804681800123-0 of ledger stream 10 cannot be read: ")
    assert reason in str(broken.value)
    assert broken.value.account == "alice"
    [(name, text)] = changes.items()
    shown = text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
    content = json.loads(broken.value.content)
    assert content[content.index(name) + 1] == shown
    assert len(content) == 2 * len(SETTLED)


@pytest.mark.parametrize("missing", ["account", "sequence", "kind", "id", "time", "postings", "balance_after"])
def test_an_entry_without_a_field(missing: str) -> None:
    with pytest.raises(BrokenEntry, match=f"it has no '{missing}'"):
        parsed([missing])


def test_a_field_that_is_there_twice_or_has_no_value() -> None:
    words = [word.encode() for pair in SETTLED.items() for word in pair]
    with pytest.raises(BrokenEntry, match="a field is in it twice"):
        parse_entry(0, b"1-0", [*words, b"kind", b"grant"])
    with pytest.raises(BrokenEntry):
        parse_entry(0, b"1-0", [*words, b"kind"])


@pytest.mark.parametrize("note", ["plain text", "[1]", "[" * 100_000, '{"reason": NaN}', "1" * 5000])
def test_a_note_that_is_no_object_is_kept_as_it_is(note: str) -> None:
    assert parsed(note=note).extra == {"note": {"text": note}}


@pytest.mark.parametrize(
    "note",
    [{"tokens": [1]}, {"tokens": {"input": 1.5}}, {"tokens": {"input": True}}, {"reason": 5}, {"reason": "\ud800"}],
)
def test_members_of_another_type_are_kept_beside(note: dict[str, object]) -> None:
    entry = parsed(note=json.dumps(note))
    assert (entry.extra, entry.tokens, entry.reason) == ({"note": note}, {}, "")


# --- the sum ----------------------------------------------------------------------------------------------------


def grant(sequence: int, nano: int, balance: int) -> Entry:
    return Entry(
        0,
        f"{sequence}-0",
        "alice",
        sequence,
        "grant",
        f"op{sequence}",
        1,
        {"bought": -nano, "balance": nano},
        {},
        balance,
    )


def test_amounts_beyond_64_bits_add_up() -> None:
    fold = Fold("alice")
    for sequence in range(1, 30):
        fold.add(grant(sequence, 10**18 - 1, 0))
    assert fold.books["balance"] == 29 * (10**18 - 1)


def test_one_wrong_entry_is_one_finding() -> None:
    fold = Fold("alice")
    for entry in (grant(1, 5, 5), grant(2, 5, 11), grant(3, 5, 16)):
        fold.add(entry)
    assert [str(one) for one in fold.mismatches] == [
        "account alice: balance after entry 2 (grant op2): expected 0.00000001, found 0.000000011"
    ]


def test_the_list_of_findings_ends() -> None:
    fold = Fold("alice")
    for sequence in range(2, 2 + 2 * MOST_MISMATCHES, 2):
        fold.add(replace(grant(sequence, 0, 0), postings={"balance": 1}, balance_after_nano=0))
    assert len(fold.mismatches) == MOST_MISMATCHES + 1
    assert str(fold.mismatches[-1]) == f"account alice: further mismatches: expected 0, found {2 * MOST_MISMATCHES}"


LIVE = {
    "plan": "standard",
    "sequence": "1",
    "balance": "0",
    "balance_held": "0",
    "w1": f"{DAY}|1804723200000|1000|170|70|0|5|1|30|3,4",
    "k:0123": "1|name",
}


def test_a_window_that_replaced_another_counts_what_that_held() -> None:
    live = parse_live("alice", LIVE)
    holds = [
        parse_hold(f"open|alice|{parts}|0|1|1000000|1|charge_seen|1|2|asked||model|0|0|0|")
        for parts in (f"70@{DAY}:5", "30@3600000:4")
    ]
    fold = Fold("alice")
    fold.check(live, [hold for hold in holds if hold])
    assert fold.mismatches == []
    fold.check(live, [hold for hold in holds[:1] if hold])
    assert [one.what for one in fold.mismatches] == ["adopted in the 24 h window by open reservations"]


@pytest.mark.parametrize("text", ["settled|alice||0|0", "expired|alice|", "op:x", "", "grant|alice|5"])
def test_what_is_over_holds_nothing(text: str) -> None:
    assert parse_hold(text) is None


@pytest.mark.parametrize(
    "changes", [{"balance": "1.5"}, {"w1": "1|2|3"}, {"w1": "a|b"}, {"total_spent": "-"}, {"sequence": ""}]
)
def test_a_hash_with_a_figure_that_is_none(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        parse_live("alice", LIVE | changes)


def test_a_hash_without_a_figure() -> None:
    with pytest.raises(ValueError, match="there is no sequence"):
        parse_live("alice", {name: text for name, text in LIVE.items() if name != "sequence"})


def test_a_hash_without_a_balance_has_never_had_one() -> None:
    live = parse_live("alice", {name: text for name, text in LIVE.items() if not name.startswith("balance")})
    assert (live.balance_nano, live.balance_held_nano) == (0, 0)
