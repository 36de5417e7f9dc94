"""The table of what each fault can cost: stated here, measured by the tests, rendered for the README.

QUOTA_GATEWAY_FAULT_ROWS=rows.jsonl pytest -m "long or not long" tests/faults
python -m tests.faults.table rows.jsonl
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Names the file that the tests append what they measured to.
ROWS_VARIABLE = "QUOTA_GATEWAY_FAULT_ROWS"


@dataclass(frozen=True)
class Fault:
    """One row: what fails, what the client sees of it, what it can cost at most, and the test that shows it."""

    name: str
    fault: str
    client: str
    bound: str
    test: str

    def row(self, measured: str) -> str:
        """The row in Markdown."""
        return f"| {self.fault} | {self.client} | {self.bound} | {measured} | `tests/faults/{self.test}` |"


HEADER = "| failure | what the client sees | what it can cost at most | measured | shown by |\n|---|---|---|---|---|"

FAULTS = (
    Fault(
        "gateway killed, streamed",
        "gateway killed (SIGKILL, out of memory), streamed answers",
        "a broken connection",
        "of each stream its last 11 s at most, and no more than one extension of its hold covers. Holds end with their "
        "leases, 60 s after the last renewal",
        "test_gateway_killed.py::test_a_stream_of_a_killed_gateway_is_charged_as_far_as_was_recorded",
    ),
    Fault(
        "gateway killed, whole",
        "gateway killed, whole answers",
        "a broken connection",
        "the answers in flight: what nobody got is not charged. One that was being settled may be",
        "test_gateway_killed.py::test_a_whole_answer_of_a_killed_gateway_is_charged_only_if_it_was_settled",
    ),
    Fault(
        "gateway killed, sound",
        "gateway killed while it passes sound, or the answer of a priced path, on",
        "a broken transfer",
        "one that began in the last 11 s at most: from then on its whole price is recorded",
        "test_sound_killed.py::test_sound_of_a_killed_gateway_is_charged_once_its_price_was_recorded",
    ),
    Fault(
        "gateway killed, settling",
        "gateway killed while the store is told what to charge",
        "a broken connection",
        "where the call was lost too, as above; where the store ran it, nothing: it is charged once",
        "test_gateway_killed.py::test_a_gateway_killed_while_it_settles_charges_once_or_what_was_recorded",
    ),
    Fault(
        "gateway killed, embedded",
        "gateway killed together with its embedded store",
        "a broken connection",
        "as above; the next start ends the holds at once",
        "test_gateway_killed.py::test_with_an_embedded_store_the_next_start_charges_what_was_recorded",
    ),
    Fault(
        "gateway killed after the journal",
        "gateway killed while settlements wait in its journal",
        "its answer",
        "nothing: the next gateway on the data directory says them to the store",
        "test_gateway_killed.py::test_what_a_killed_gateway_left_in_its_journal_lands_at_its_next_start",
    ),
    Fault(
        "gateway killed at every await",
        "gateway killed at any `await` of a request's life",
        "a broken connection, or its answer",
        "as above, whichever it is: charged in full or as far as was recorded, and once",
        "test_every_await.py::test_a_request_is_charged_once_at_whichever_await_its_gateway_dies",
    ),
    Fault(
        "store killed",
        "store killed (SIGKILL), `appendfsync everysec`",
        "its answer; 503 `quota_store_unavailable` until it is back. A stream that needs more than it holds waits "
        "10 s, then ends in an error event; what was sent is charged",
        "nothing: settlements wait in the journal and land once",
        "test_store_faults.py::test_a_store_killed_mid_stream_and_while_settling_loses_nothing",
    ),
    Fault(
        "embedded store killed",
        "embedded store killed (SIGKILL)",
        "its answer; 503 until it is back",
        "nothing: settlements wait in the journal and land once",
        "test_store_faults.py::test_an_embedded_store_killed_mid_stream_loses_nothing",
    ),
    Fault(
        "store hangs",
        "store hangs for longer than its timeout (SIGSTOP)",
        "its answer; 503, and nothing is forwarded",
        "nothing; nothing is charged twice",
        "test_store_faults.py::test_a_store_that_hangs_gets_its_settlements_once",
    ),
    Fault(
        "lost replies",
        "a call to the store or its reply is lost (reserve, extend, settle, void)",
        "nothing of it",
        "nothing: each is repeated by its id and happens once",
        "test_lost_replies.py::test_a_lost_call_or_reply_happens_once",
    ),
    Fault(
        "lost grant",
        "a grant or its reply is lost",
        "–",
        "nothing: it is repeated by its operation id and happens once",
        "test_lost_replies.py::test_a_grant_whose_reply_is_lost_happens_once",
    ),
    Fault(
        "slot moves",
        "a slot of the cluster moves to another node under load",
        "its answer, some later; at worst 503 while a script's keys lie on two nodes",
        "nothing",
        "test_primaries.py::test_a_slot_moves_under_a_gateways_traffic",
    ),
    Fault(
        "cluster failover",
        "a primary of the cluster dies with writes that its replica has not got",
        "503 until the replica has taken over",
        "nothing that a living gateway settled in the last 60 s, its last 100,000 at most: it says that again",
        "test_primaries.py::test_settlements_that_a_replica_of_a_cluster_lacked_are_said_again",
    ),
    Fault(
        "sentinel failover",
        "a primary behind sentinels dies with writes that its replica has not got",
        "503 until the replica has taken over",
        "the same",
        "test_primaries.py::test_settlements_that_a_replica_behind_sentinels_lacked_are_said_again",
    ),
    Fault(
        "disk full",
        "the gateway's disk is full while the store is away",
        "its answer",
        "nothing while the gateway lives: settlements wait in its memory. Killed too: what it settled meanwhile, as "
        "far as it was not recorded before",
        "test_store_faults.py::test_settlements_that_the_journal_has_no_room_for_wait_in_memory",
    ),
    Fault(
        "gateway's clock",
        "a gateway's clock is 10 minutes off",
        "its answer within a window; 503 where a refresh would be due",
        "nothing: no window is refreshed by it",
        "test_clocks.py::test_a_gateway_whose_clock_is_off_admits_within_a_window_and_refreshes_none",
    ),
    Fault(
        "scripts flushed",
        "scripts flushed from the store under load",
        "its answer",
        "nothing: they are sent again",
        "test_store_faults.py::test_scripts_flushed_under_traffic_are_sent_again",
    ),
    Fault(
        "store out of memory",
        "store out of memory (`noeviction`)",
        "its answer; 503, and nothing is forwarded",
        "nothing: settlements wait in the journal until there is memory",
        "test_store_faults.py::test_a_store_without_memory_admits_nothing_and_gets_its_settlements_later",
    ),
    Fault(
        "workers killed",
        "many processes killed at random moments, in the middle of everything that can happen to an account",
        "–",
        "as above; no credit appears, and none goes anywhere else",
        "test_bank.py::test_no_credit_appears_or_vanishes",
    ),
)
_BY_NAME = {fault.name: fault for fault in FAULTS}


def measured(name: str, lost: int, unit: str, of: str = "") -> None:
    """Note what a test found: so much was lost, and what of."""
    assert name in _BY_NAME
    path = os.environ.get(ROWS_VARIABLE)
    if path:
        with Path(path).open("a") as rows:
            rows.write(json.dumps({"name": name, "lost": lost, "unit": unit, "of": of}) + "\n")


def worst(lines: Iterable[str]) -> dict[str, str]:
    """For each fault the worst that was measured."""
    found: dict[str, tuple[int, str]] = {}
    for line in lines:
        row = json.loads(line)
        text = f"{row['lost']} {row['unit']}{' of ' + row['of'] if row['of'] else ''}"
        found[row["name"]] = max(found.get(row["name"], (-1, "")), (row["lost"], text))
    return {name: text for name, (_, text) in found.items()}


def table(measurements: Mapping[str, str]) -> str:
    """The table in Markdown."""
    return "\n".join((HEADER, *(fault.row(measurements.get(fault.name, "–")) for fault in FAULTS)))


if __name__ == "__main__":
    print(table(worst(Path(sys.argv[1]).read_text().splitlines()) if len(sys.argv) > 1 else {}))
