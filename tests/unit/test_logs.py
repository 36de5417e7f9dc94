"""Log lines, as a collector reads them from stderr."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from typing import Any

import pytest


def logged(script: str) -> list[Any]:
    """The JSON lines that a process of its own writes: setup_logging is for a whole process."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == ""
    return [json.loads(line) for line in ran.stderr.splitlines()]


REQUEST = """
    import asyncio
    from gateway.telemetry.logs import log_request, setup_logging
    async def request():
        for _ in range({times}):
            log_request(
                request_id={request_id!r}, account="acme", key_id="key_1", model={model!r}, status=200,
                decision="admitted", reserved_nano=1_000_000_638, cost_nano=638, seconds=1.23456789,
                overhead_seconds=0.001,
            )
    setup_logging("info")
    asyncio.run(request())
"""


def test_a_request_is_one_line_of_json() -> None:
    (line,) = logged(REQUEST.format(times=1, request_id="req-1", model="llama"))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "gateway.requests",
        "message": "request",
        "request_id": "req-1",
        "account": "acme",
        "key_id": "key_1",
        "model": "llama",
        "status": 200,
        "decision": "admitted",
        "reason": None,
        "reserved": "1.000000638",
        "cost": "0.000000638",
        "seconds": 1.234568,
        "overhead_seconds": 0.001,
        "first_token_seconds": None,
    }


def test_what_a_request_did_not_come_to_is_null_in_its_line() -> None:
    (line,) = logged(
        """
        import asyncio
        from gateway.telemetry.logs import log_request, setup_logging
        async def request():
            log_request(request_id="req_1", account=None, key_id=None, model=None, status=401, decision="none",
                        reason='a "reason"', seconds=0.0000004, first_token_seconds=123.4)
        setup_logging("info", 2)
        asyncio.run(request())
        """
    )
    assert list(line) == [
        *("time", "level", "logger", "message", "worker", "request_id", "account", "key_id", "model", "status"),
        *("decision", "reason", "reserved", "cost", "seconds", "overhead_seconds", "first_token_seconds"),
    ]
    del line["time"], line["level"], line["logger"], line["message"]
    assert list(line.values()) == [
        *(2, "req_1", None, None, None, 401, "none", 'a "reason"'),
        *(None, None, 0, None, 123.4),
    ]


def test_lines_of_several_processes_do_not_mix_in_their_pipe() -> None:
    script = textwrap.dedent(REQUEST.format(times=2000, request_id="r", model="m" * 200))
    reading, writing = os.pipe()
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(subprocess.Popen([sys.executable, "-c", script], stderr=writing))
        os.close(writing)
        text = stack.enter_context(os.fdopen(reading)).read()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["model"] for line in lines] == ["m" * 200] * 4000


@pytest.mark.parametrize(
    "hostile", ['x\n{"level":"info","account":"forged"}', "x\r\x1b[2J\x00", "\ud800 not utf-8 \udcff", '"}, {"a":"']
)
def test_a_client_cannot_write_a_line_of_its_own(hostile: str) -> None:
    (line,) = logged(REQUEST.format(times=1, request_id=hostile, model=hostile))
    assert line["account"] == "acme"
    assert line["request_id"] == line["model"] == hostile.encode("utf-8", "backslashreplace").decode()


def test_a_client_cannot_fill_the_disk_with_a_name() -> None:
    (line,) = logged(REQUEST.format(times=1, request_id="r", model="m" * 100_000))
    assert line["model"] == "m" * 200


def test_other_records_and_their_exceptions_stay_on_one_line() -> None:
    lines = logged(
        """
        import logging
        from gateway.telemetry.logs import setup_logging
        setup_logging("warning")
        logging.getLogger("gateway.store").info("not wanted")
        try:
            raise RuntimeError("first\\nsecond")
        except RuntimeError:
            logging.getLogger("gateway.http").exception("handler\\nfailed")
        """
    )
    (line,) = lines
    assert line["level"] == "error"
    assert line["message"] == "handler\nfailed"
    assert "RuntimeError: first\nsecond" in line["exception"]


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        logged('from gateway.telemetry.logs import setup_logging; setup_logging("loud")')


def test_the_lines_of_a_worker_name_it() -> None:
    (line,) = logged(
        """
        import logging
        from gateway.telemetry.logs import setup_logging
        setup_logging("info", 2)
        logging.getLogger("gateway").warning("hello")
        """
    )
    assert line["worker"] == 2
