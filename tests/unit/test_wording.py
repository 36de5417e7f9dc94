"""The packed calls are those that a general client packs."""

import pytest

from gateway.credits.connection import pack
from gateway.credits.keyspace import money_keys
from gateway.credits.reservations import LEASE_MS
from gateway.credits.wording import Wording

ID = "rsv_0a0123456789abcdef01234567"
TEXTS = ["standard", "", "größer", "模型", "line\r\n$3\r\nend"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key_id", ["0123456789abcdef01234567", ""])
@pytest.mark.parametrize("lease_ms", [LEASE_MS, 1, 600_000])
def test_a_reservation(text: str, key_id: str, lease_ms: int) -> None:
    account = f"acme {text}"
    wording = Wording("a" * 40, "b" * 40, account, key_id, text, text, f"1|{text}")
    keys = money_keys(account)
    assert wording.key == keys[0]
    for body_hash in ("", "f" * 24):
        asked, now = f"6380,,0,,1,{body_hash}", 1_790_000_000_000 if body_hash else 7
        arguments = (account, ID, asked, lease_ms, now, key_id, text, body_hash, text, f"1|{text}")
        expected = pack("EVALSHA", "a" * 40, 4, *keys, *arguments)
        assert wording.reserve(ID, asked, lease_ms, now, body_hash) == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("created_ms", [1_790_000_000_000, 0])
def test_a_settlement(text: str, created_ms: int) -> None:
    account = f"acme {text}"
    wording = Wording("a" * 40, "b" * 40, account, "key", text, text, f"1|{text}")
    for note in (text, '{"model": "' + text + '"}'):
        for payg, plan in ((0, 0), (2**52 - 1, 9), (10, 10)):
            arguments = (account, ID, payg, plan, note, created_ms, "key", text, text, f"1|{text}")
            expected = pack("EVALSHA", "b" * 40, 4, *money_keys(account), *arguments)
            assert wording.settle(ID, payg, plan, note, created_ms) == expected
