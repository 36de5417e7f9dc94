"""The command line, run as its users run it: a process, its output and its exit code."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from gateway import cli
from gateway.config.load import load, shipped_dir
from gateway.credits.embedded import running_url
from gateway.credits.journal import Journal
from gateway.credits.operator import Operator
from gateway.credits.service import CreditEngine, Reservation
from gateway.credits.store import Store
from gateway.telemetry.metrics import Metrics
from tests.gateway_process import Gateway, gateway_config, running_gateway
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
SHIPPED = shipped_dir() / "gateway.yaml"
SECRET = "sk-of-the-operators-choosing-0123456789"
NANO = Decimal("0.000000001")


def environment(**more: str) -> dict[str, str]:
    """Ours, without a key that would turn the demo model off, and with the package to be found from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "IONET_API_KEY": "", **more}


@dataclass(frozen=True)
class Command:
    """``quota-gateway`` in a directory of its own, on one configuration and data directory."""

    directory: Path
    data_dir: Path
    config: Path = SHIPPED

    def plain(self, *arguments: str, stdin: str | bytes = b"", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run with exactly these arguments."""
        ended = subprocess.run(
            [sys.executable, "-m", "gateway", *arguments],
            cwd=self.directory,
            env=environment(**variables),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        out, err = ended.stdout.decode(), ended.stderr.decode()
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(ended.args, ended.returncode, out, err)

    def run(self, *arguments: str, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a verb on the configuration and the data directory, which the first one is told to be new."""
        where = ("--config", str(self.config), "--data-dir", str(self.data_dir))
        ended = self.plain(*arguments, *where, stdin=stdin)
        ended.stderr = ended.stderr.removeprefix(f"quota-gateway: making a new store in {self.data_dir}\n")
        return ended

    def text(self, *arguments: str, stdin: str | bytes = b"") -> str:
        """The output for people of a verb that does its work."""
        ended = self.run(*arguments, stdin=stdin)
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        return ended.stdout

    def json(self, *arguments: str, stdin: str | bytes = b"") -> Any:
        """The output for programs of a verb that does its work."""
        return json.loads(self.text(*arguments, "--json", stdin=stdin))

    def refusal(self, *arguments: str, stdin: str | bytes = b"") -> str:
        """The one line that a verb says instead of doing its work."""
        ended = self.run(*arguments, stdin=stdin)
        assert (ended.returncode, ended.stdout) == (1, ""), ended
        line = ended.stderr.removesuffix("\n")
        assert line.startswith("quota-gateway: ") and "\n" not in line, ended.stderr
        return line.removeprefix("quota-gateway: ")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """With no gateway running: each verb starts the embedded store for itself."""
    return Command(tmp_path, tmp_path / "data")


@pytest.fixture
def gateway(command: Command) -> Iterator[Gateway]:
    with running_gateway(SHIPPED, data_dir=command.data_dir, env=environment()) as gateway:
        yield gateway


@dataclass(frozen=True)
class Said:
    """What a verb ended with."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Here:
    """The command in this process, for tests to which a dozen starts of a whole command would be slow."""

    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: str) -> Said:
        self.capsys.readouterr()
        return Said(cli.main(arguments), *self.capsys.readouterr())


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="module")
def module_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def store_with_alice(module_directory: Path) -> Iterator[Path]:
    """The data directory of a running gateway with an account ``alice`` on the shipped configuration's plan."""
    with running_gateway(SHIPPED, data_dir=module_directory / "data", env=environment()) as gateway:
        gateway.cli("accounts", "create", "alice")
        yield gateway.data_dir


@pytest.fixture(params=["stopped", "running"])
def either(request: pytest.FixtureRequest, command: Command) -> Command:
    """Beside a running gateway and without one."""
    if request.param == "running":
        request.getfixturevalue("gateway")
    return command


# --- the operator's verbs ---------------------------------------------------------------------------------------


def test_the_credits_of_an_account(either: Command) -> None:
    either.text("accounts", "create", "alice")
    assert either.refusal("accounts", "create", "alice") == "account 'alice' exists already, on plan 'standard'"

    grant = ("credits", "grant", "alice", "12.50", "--operation-id", "invoice:7", "--reason", "paid, thank you")
    granted = {"account": "alice", "balance": "12.5", "operation_id": "invoice:7", "repeated": False}
    assert either.json(*grant) == granted
    assert either.json(*grant) == {**granted, "repeated": True}
    assert "used before for something else" in either.refusal(*grant[:3], "13", "--operation-id", "invoice:7")
    assert either.refusal("credits", "refund", "alice", "0.000000001").startswith("at most 0 credits were charged")
    assert either.json("credits", "grant", "alice", "3")["balance"] == "15.5"
    assert either.json("credits", "deduct", "alice", "3", "--reason", "a slip")["balance"] == "12.5"
    assert either.refusal("credits", "deduct", "alice", "12.6").startswith("at most 12.5 credits are neither spent")

    shown = either.json("credits", "show", "alice")
    resets_at = datetime.strptime(shown["allowance"]["resets_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert timedelta() < resets_at - datetime.now(UTC) + timedelta(minutes=1) <= timedelta(days=1, minutes=1)
    expected: dict[str, Any] = {
        "account": "alice",
        "plan": "standard",
        "allowance": {
            "granted": "0.1",
            "used": "0",
            "held": "0",
            "remaining": "0.1",
            "window": (resets_at.date() - date(1970, 1, 1)).days - 1,
            "resets_at": f"{resets_at:%Y-%m-%d}T00:00:00Z",
        },
        "balance": "12.5",
        "balance_held": "0",
    }
    window = {"refresh": "24h", "granted": "0.1", "used": "0", "held": "0", "remaining": "0.1"}
    expected["windows"] = [{**window, "resets_at": shown["allowance"]["resets_at"]}]
    assert shown == expected
    assert either.json("accounts", "show", "alice") == {**expected, "keys": 0}
    assert expected in either.json("accounts", "list")["data"]

    text = either.text("credits", "show", "alice")
    assert re.search(r"^allowance  0\.1 of 0\.1 left \(0 used, 0 held\); resets 20.*Z, in \d+ h \d+ min$", text, re.M)
    assert re.search(r"^balance +12\.5$", text, re.M)
    assert re.search(r"^alice +standard +0\.1 +12\.5$", either.text("accounts", "list"), re.M)


def test_the_keys_of_an_account(either: Command) -> None:
    either.text("accounts", "create", "alice")
    made = either.json("keys", "create", "alice", "--name", "laptop")
    identity = {"account": "alice", "source": "api"}
    assert made == {**identity, "id": made["id"], "name": "laptop", "secret": made["secret"]}
    assert re.fullmatch(r"key_[0-9a-f]{24}", made["id"]) and re.fullmatch(r"sk-qg-\S{43}", made["secret"])

    imported = either.json("keys", "create", "alice", "--secret-file", "-", stdin=f"{SECRET}\n")
    assert imported == {**identity, "id": imported["id"], "name": "", "secret": None}
    assert "with this secret already" in either.refusal("keys", "create", "alice", "--secret-file", "-", stdin=SECRET)

    listed = either.json("keys", "list", "alice")["data"]
    assert [(key["id"], key["name"]) for key in listed] == [(made["id"], "laptop"), (imported["id"], "")]
    assert either.json("keys", "create", "alice", "--source", "chat")["source"] == "chat"
    assert [key["source"] for key in either.json("keys", "list", "alice")["data"]] == ["api", "api", "chat"]
    either.text("keys", "revoke", either.json("keys", "list", "alice")["data"][2]["id"])
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", key["created_at"]) for key in listed)
    assert either.json("accounts", "show", "alice")["keys"] == 2

    assert either.text("keys", "revoke", made["id"]) == f"revoked {made['id']} of account alice\n"
    assert either.refusal("keys", "revoke", made["id"]) == f"there is no key '{made['id']}'"
    assert [key["id"] for key in either.json("keys", "list", "alice")["data"]] == [imported["id"]]


def test_a_key_is_shown_once_and_only_if_it_is_new(command: Command) -> None:
    command.text("accounts", "create", "alice")
    secrets = re.findall(r"sk-qg-\S{43}", command.text("keys", "create", "alice"))
    (command.directory / "secret").write_text(f"{SECRET}\r\n")
    text = command.text("keys", "create", "alice", "--name", "imported", "--secret-file", "secret")
    assert len(secrets) == 1 and SECRET not in text
    listing = command.text("keys", "list", "alice")
    assert "imported" in listing and secrets[0] not in listing and SECRET not in listing


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        (b"too short\n", "a secret is 16 to 256 visible ASCII characters, without spaces"),
        (f"{SECRET}\n\n".encode(), "a secret is 16 to 256 visible ASCII characters, without spaces"),
        ("sk-mit-ümläuten-0123456789".encode(), "a secret is 16 to 256 visible ASCII characters, without spaces"),
        (b"x" * 5000, "a secret is 16 to 256 visible ASCII characters, without spaces"),
    ],
)
def test_unusable_secrets_are_refused_before_anything_is_done(command: Command, secret: bytes, message: str) -> None:
    assert command.refusal("keys", "create", "alice", "--secret-file", "-", stdin=secret) == message
    assert not command.data_dir.exists()


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "No such file or directory"), (".", "Is a directory")])
def test_a_secret_file_that_cannot_be_read(command: Command, name: str, reason: str) -> None:
    refusal = command.refusal("keys", "create", "alice", "--secret-file", name)
    assert refusal == f"cannot read the secret from {name}: {reason}"


def test_the_plan_of_an_account(command: Command) -> None:
    command.text("accounts", "create", "bob", "--plan", "developer")
    shown = command.json("credits", "show", "bob")
    days = 150 / Decimal(shown["allowance"]["granted"]) / 3
    assert shown["plan"] == "developer" and 28 <= round(days) <= 31

    command.text("accounts", "set-plan", "bob", "professional", "--operation-id", "upgrade-1")
    command.text("accounts", "set-plan", "bob", "professional", "--operation-id", "upgrade-1")
    assert command.json("credits", "show", "bob")["plan"] == "professional"
    stale = command.refusal("accounts", "set-plan", "bob", "standard", "--version", "1")
    assert stale == "version 1 is not newer than 1, which was applied; nothing was done"
    assert re.search(r"^plan +standard$", command.text("accounts", "set-plan", "bob", "standard"), re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accounts", "show", "nobody"), "there is no account 'nobody'"),
        (("accounts", "set-plan", "nobody", "standard"), "there is no account 'nobody'"),
        (
            ("accounts", "create", "carol", "--plan", "gold"),
            "plan 'gold' is not in the configuration, which has standard, professional, developer",
        ),
        (("keys", "create", "nobody"), "there is no account 'nobody'"),
        (("keys", "list", "nobody"), "there is no account 'nobody'"),
        (
            ("keys", "revoke", "sk-pasted"),
            "that is not a key's id: give it as `keys list` shows it, key_ and 24 digits",
        ),
        (("credits", "grant", "acme", "0"), "the amount must be more than 0"),
        (("credits", "grant", "nobody", "1"), "there is no account 'nobody'"),
        (("credits", "refund", "nobody", "1"), "there is no account 'nobody'"),
        (("credits", "show", "nobody"), "there is no account 'nobody'"),
        (("reservations", "list", "nobody"), "there is no account 'nobody'"),
        (("reservations", "void", "rsv_0"), "there is no reservation 'rsv_0'"),
        (("reservations", "void", "rsv_00" + "0" * 24), f"there is no reservation 'rsv_00{'0' * 24}'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_unknown_names(store_with_alice: Path, here: "Here", arguments: tuple[str, ...], message: str) -> None:
    ended = here.run(*arguments, "--config", str(SHIPPED), "--data-dir", str(store_with_alice))
    assert ended == Said(1, "", f"quota-gateway: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("credits", "grant", "alice", "1e3"), "'1e3' is not an amount of credits: write a plain decimal"),
        (("credits", "grant", "alice", "-1"), "'-1' is not an amount of credits: write a plain decimal"),
        (("credits", "refund", "alice", "0.0000000001"), "'0.0000000001' is not an amount of credits: write a plain"),
        (("credits", "grant", "alice", "0x10"), "'0x10' is not an amount of credits"),
        (("credits", "grant", "alice", "nan"), "'nan' is not an amount of credits"),
        (
            ("credits", "grant", "alice", "9999999"),
            "9999999 credits is more than an account can hold (4503599.627370495)",
        ),
        (("credits", "grant", "alice", "1", "--operation-id", "a b"), "'a b' is not an operation id"),
        (("credits", "grant", "alice", "1", "--reason", "x" * 201), "a reason has at most 200 characters"),
        (("credits", "grant", "alice", "1", "--reason", "two\nlines"), "a reason is one line of text"),
        (("accounts", "create", "-alice"), "the following arguments are required: ACCOUNT"),
        (("accounts", "create", "al ice"), "'al ice' is not an account name: 1 to 64 letters, digits"),
        (("accounts", "create", "a" * 65), "is not an account name"),
        (("accounts", "create", ""), "'' is not an account name"),
        (("accounts", "set-plan", "alice", "standard", "--version", "0"), "'0' is not a version"),
        (("keys", "create", "alice", "--name", "a|b"), "'a|b' is not a key name"),
        (("keys", "revoke", "schlüssel"), "'schlüssel' is not an id"),
        (("serve", "--listen", "8080"), "argument --listen: must be host:port such as 127.0.0.1:8080"),
        (("serve", "--workers", "0"), "'0' is not a number of workers from 1 to 64"),
        (("serve", "--workers", "65"), "'65' is not a number of workers from 1 to 64"),
        (("serve", "--workers", "two"), "'two' is not a number of workers from 1 to 64"),
        (("accounts",), "the following arguments are required: VERB"),
        (("accounts", "delete", "alice"), "invalid choice: 'delete'"),
        (("accounts", "list", "--js"), "unrecognized arguments: --js"),
    ],
    ids=lambda value: " ".join(value)[:60].replace("\n", " ") if isinstance(value, tuple) else "",
)
def test_usage_errors_do_nothing_and_exit_with_2(command: Command, arguments: tuple[str, ...], message: str) -> None:
    ended = command.plain(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    first, rest = ended.stderr.split("\n", 1)
    assert first.startswith("quota-gateway: ") and message in first
    assert rest.startswith("usage: quota-gateway")
    assert list(command.directory.iterdir()) == []


async def test_names_are_checked_below_the_command_line_too(operator: Operator) -> None:
    await operator.create_account("alice")
    for call in (
        operator.create_account("a|b"),
        operator.funds("a|b"),
        operator.keys("a|b"),
        operator.create_key("a|b"),
        operator.reservations("a|b"),
        operator.set_plan("a|b", "standard"),
        operator.set_plan("alice", "standard", "an operation"),
        operator.credit("a|b", 1, "grant"),
        operator.credit("alice", 1, "grant", "an operation"),
        operator.credit("alice", 1, "grant", reason="two\nlines"),
    ):
        with pytest.raises(ValueError, match=r"is not an account name|is not an operation id|is one line of text"):
            await call
    assert (await operator.funds("alice")).balance_nano == 0


def test_accounts_on_a_plan_that_is_gone_are_named(command: Command) -> None:
    def write(*plans: str) -> Path:
        path = command.directory / "config.yaml"
        defined = {plan: {"default": plan == "basic"} for plan in plans}
        path.write_text(yaml.safe_dump(gateway_config("http://127.0.0.1:1/v1", ["m"], plans=defined)))
        return path

    command = Command(command.directory, command.data_dir, write("basic", "old"))
    command.text("accounts", "create", "alice", "--plan", "old")
    command.text("credits", "grant", "alice", "12.5")
    command.text("accounts", "create", "bob")
    write("basic")
    alice, bob = command.json("accounts", "list")["data"]
    reason = (
        "plan 'old' is not in the configuration: the account's requests are refused until the plan is back or "
        "`accounts set-plan` moves the account to another"
    )
    assert alice == {
        "account": "alice",
        "plan": "old",
        "allowance": None,
        "windows": [],
        "balance": "12.5",
        "balance_held": "0",
        "error": reason,
    }
    assert (bob["account"], bob["plan"]) == ("bob", "basic")
    assert bob["allowance"]["window"] is None and bob["allowance"]["resets_at"] is None
    assert "12.5 (plan 'old' is not in the configuration)" in command.text("accounts", "list")

    # What it has is not lost, and a customer may well ask for it.
    assert command.json("credits", "show", "alice") == alice
    assert command.json("accounts", "show", "alice") == {**alice, "keys": 0}
    shown = command.text("credits", "show", "alice").splitlines()
    assert [line.split(maxsplit=1) for line in shown] == [
        ["account", "alice"],
        ["plan", "old"],
        ["balance", "12.5"],
        ["note", reason],
    ]
    command.text("accounts", "set-plan", "alice", "basic")
    assert command.json("credits", "show", "alice")["balance"] == "12.5"


def test_the_first_start_leaves_an_account_for_the_verbs(command: Command) -> None:
    with running_gateway(SHIPPED, data_dir=command.data_dir, env=environment()) as gateway:
        assert gateway.key is not None
    assert [account["account"] for account in command.json("accounts", "list")["data"]] == ["default"]
    assert [key["name"] for key in command.json("keys", "list", "default")["data"]] == ["first"]


# --- credits that move ------------------------------------------------------------------------------------------


def test_a_refund_is_limited_to_what_was_charged(tmp_path: Path) -> None:
    config = gateway_config("http://127.0.0.1:1/v1", ["m"], plans={"payg": {"default": True}})
    config["upstreams"]["test"]["api_key"] = ""  # so that the demo model answers
    with running_gateway(config, data_dir=tmp_path / "data", env=environment()) as gateway:
        command = Command(tmp_path, gateway.data_dir, gateway.config)
        command.text("credits", "grant", "default", "1")
        chat(gateway)
        balance = Decimal(command.json("credits", "show", "default")["balance"])
        charged = 1 - balance
        assert charged > 0
        too_much = command.refusal("credits", "refund", "default", f"{charged + NANO:f}")
        assert too_much == f"at most {charged:f} credits were charged to the balance and not refunded yet"
        assert command.json("credits", "refund", "default", f"{charged:f}")["balance"] == "1"
        assert command.refusal("credits", "refund", "default", "0.000000001").startswith("at most 0 credits")


def chat(gateway: Gateway, expected_status: int = 200) -> str:
    """Send a request; its id."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    request = urllib.request.Request(
        f"{gateway.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            status, headers = answer.status, answer.headers
    except urllib.error.HTTPError as error:
        with error:
            status, headers = error.status, error.headers
    assert status == expected_status
    return str(headers["x-request-id"])


def test_a_refund_of_a_request_names_what_was_typed(tmp_path: Path, here: Here) -> None:
    nobody_listens = f"http://127.0.0.1:{free_port()}/v1"
    plans = {"payg": {"default": True, "allowance": {"per_window": 1, "refresh": "24h"}}}
    config = gateway_config(nobody_listens, ["m"], plans=plans)
    with running_gateway(config, data_dir=tmp_path / "data") as gateway:
        where = ("--config", str(gateway.config), "--data-dir", str(gateway.data_dir))
        failed = chat(gateway, 502)
        ended = here.run("credits", "refund", "default", "--request", failed, *where)
        line = f"quota-gateway: {failed} is voided: only what was charged can be refunded\n"
        assert ended == Said(1, "", line)
        for never in (f"req_{'0' * 24}", f"rsv_00{'0' * 24}", "req_", "invoice-7"):
            ended = here.run("credits", "refund", "default", "--request", never, *where)
            assert (ended.code, ended.out) == (1, "")
            assert ended.err.startswith(
                f"quota-gateway: there is no request '{never}' that account 'default' was charged for in the last 24 h"
            )
            assert "rsv_" not in ended.err.replace(never, "")


async def test_an_open_reservation_is_listed_and_voided(command: Command, gateway: Gateway, tmp_path: Path) -> None:
    config = load(SHIPPED, {})
    metrics = Metrics(config.plans, config.models)
    url = running_url(command.data_dir)
    assert url is not None and gateway.key is not None
    store = Store(url, 60_000, metrics)
    await store.start()
    try:
        engine = CreditEngine(store, config.plans, config.default_plan, metrics, Journal(tmp_path / "unused"))
        identity = await engine.authenticate(gateway.key)
        assert identity is not None
        held_femto = 25 * 10**12
        made = await engine.reserve(identity, "ab" * 12, "openai/gpt-oss-20b", held_femto, held_femto, 600_000)
        assert isinstance(made, Reservation)
    finally:
        await store.close()

    [one] = command.json("reservations", "list")["data"]
    created, expires = (datetime.fromisoformat(one.pop(name)) for name in ("created_at", "lease_expires_at"))
    assert one == {"id": made.id, "account": "default", "held": "0.025", "model": "openai/gpt-oss-20b"}
    assert expires - created == timedelta(minutes=10)
    assert command.json("credits", "show", "default")["allowance"]["held"] == "0.025"
    assert re.search(rf"^{made.id} +default +0\.025 ", command.text("reservations", "list", "default"), re.M)

    assert command.text("reservations", "void", made.id) == f"voided {made.id}; its hold is free\n"
    assert command.text("reservations", "void", made.id) == f"{made.id} had ended before (voided)\n"
    assert command.json("reservations", "list") == {"data": []}
    assert command.text("reservations", "list", "default") == "no open reservations\n"
    assert command.json("credits", "show", "default")["allowance"]["held"] == "0"


# --- the gateway's verbs ----------------------------------------------------------------------------------------


def test_check_config_says_what_is_configured(command: Command) -> None:
    ended = command.plain("check-config")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("ok: plans standard (default), professional, developer; 6 models; upstreams: ")
    assert "demo model" in ended.stdout
    with_key = command.plain("check-config", IONET_API_KEY="sk-very-secret").stdout
    assert with_key.endswith("upstreams: ionet\n") and "secret" not in with_key


def test_check_config_names_every_mistake(command: Command) -> None:
    bad = ROOT / "tests/config_fixtures/many_mistakes"
    mistakes = bad.with_suffix(".txt").read_text().splitlines()
    ended = command.plain("check-config", "--config", str(bad / "gateway.yaml"), GIVEN="sk-very-secret", EMPTY="")
    assert (ended.returncode, ended.stdout) == (1, "")
    *lines, last = ended.stderr.splitlines()
    assert [line.removeprefix(f"{bad.parent}/") for line in lines] == mistakes
    assert last == f"quota-gateway: the configuration has {len(mistakes)} mistakes"


def test_every_verb_refuses_a_bad_configuration_alike(command: Command) -> None:
    ended = command.plain("accounts", "list", "--config", "nowhere.yaml")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        "nowhere.yaml:1:1: cannot be read: No such file or directory",
        "quota-gateway: the configuration has 1 mistake",
    ]


def test_schema_is_json(command: Command) -> None:
    ended = command.plain("schema")
    assert ended.returncode == 0
    assert {"listen", "upstreams", "plans", "models"} <= json.loads(ended.stdout)["properties"].keys()


def test_doctor_finds_nothing_wrong(command: Command) -> None:
    command.json("accounts", "create", "acme")
    findings = command.json("doctor")["data"]
    assert {"component", "ok", "detail"} == findings[0].keys()
    assert all(finding["ok"] for finding in findings)
    text = command.text("doctor")
    assert re.search(r"^ok +store ", text, re.M)
    assert re.search(rf"^note +archive +sqlite in {command.data_dir} is not there yet: serve makes it$", text, re.M)


READING = [
    ("accounts", "show", "acme"),
    ("accounts", "list"),
    ("credits", "show", "acme"),
    ("keys", "list", "acme"),
    ("ledger", "tail", "acme"),
    ("ledger", "export"),
    ("ledger", "verify"),
    ("reservations", "list"),
    # Nor is there anything to end, or to give to.
    ("keys", "revoke", f"key_{'0' * 24}"),
    ("reservations", "void", f"rsv_00{'0' * 24}"),
    ("credits", "grant", "acme", "1"),
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_reading_in_the_wrong_directory_makes_no_store(tmp_path: Path, here: Here, words: tuple[str, ...]) -> None:
    elsewhere = tmp_path / "elsewhere"
    for there in (False, True):
        if there:
            elsewhere.mkdir()
        ended = here.run(*words, "--config", str(SHIPPED), "--data-dir", str(elsewhere))
        assert ended == Said(
            1,
            "",
            f"quota-gateway: there is no store in {elsewhere}: name another directory with --data-dir; "
            "`quota-gateway serve` or `quota-gateway accounts create` makes a new one\n",
        )
        assert elsewhere.exists() == there and not (there and list(elsewhere.iterdir()))


def test_a_verb_in_the_wrong_directory_does_not_go_unnoticed(command: Command) -> None:
    elsewhere = command.directory / "elsewhere"
    where = ("--config", str(command.config), "--data-dir", str(elsewhere))
    ended = command.plain("doctor", *where)
    assert (ended.returncode, elsewhere.exists()) == (1, False)
    assert f"there is no store in {elsewhere}: " in ended.stdout
    ended = command.plain("accounts", "create", "acme", *where)
    assert ended.returncode == 0
    assert ended.stderr == f"quota-gateway: making a new store in {elsewhere}\n"


def test_doctor_finds_a_store_that_is_away(command: Command) -> None:
    config = gateway_config("http://127.0.0.1:1/v1", ["m"])
    config["store"] = {"url": f"redis://127.0.0.1:{free_port()}"}
    path = command.directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    ended = command.plain("doctor", "--config", str(path), "--json")
    assert ended.returncode == 1
    found = {finding["component"]: finding["ok"] for finding in json.loads(ended.stdout)["data"]}
    assert found == {"store": False, "archive": True, "upstream test": False}
    refused = command.plain("accounts", "list", "--config", str(path))
    assert refused.returncode == 1 and refused.stderr.startswith("quota-gateway: cannot reach the store: ")


def test_doctor_looks_at_the_archive(tmp_path: Path, store_with_alice: Path, here: Here) -> None:
    def archive(url: str) -> tuple[bool, str]:
        path = tmp_path / "config.yaml"
        config = gateway_config("http://127.0.0.1:1/v1", ["m"])
        path.write_text(yaml.safe_dump(config | {"archive": {"url": url}}))
        ended = here.run("doctor", "--json", "--config", str(path), "--data-dir", str(store_with_alice))
        [found] = [one for one in json.loads(ended.out)["data"] if one["component"] == "archive"]
        return found["ok"], found["detail"]

    assert archive("sqlite") == (True, f"sqlite in {store_with_alice} has this store's ledger")
    ok, detail = archive(f"sqlite://{tmp_path}/another.sqlite3")
    assert not ok and "this store's ledger goes to another archive" in detail
    assert not (tmp_path / "another.sqlite3").exists()
    (tmp_path / "text").write_text("This is not a database, and long enough for that to be noticed. " * 20)
    ok, detail = archive(f"sqlite://{tmp_path}/text")
    assert not ok and "file is not a database" in detail


@pytest.mark.parametrize(("status", "ok"), [(200, True), (404, True), (405, True), (401, False), (500, False)])
def test_doctor_does_not_ask_upstreams_for_a_list_that_they_lack(
    tmp_path: Path, store_with_alice: Path, here: Here, status: int, ok: bool
) -> None:
    class Upstream(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Upstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(gateway_config(f"http://127.0.0.1:{server.server_port}/v1", ["m"])))
            ended = here.run("doctor", "--config", str(path), "--data-dir", str(store_with_alice))
        finally:
            server.shutdown()
            thread.join()
    state = "note" if ok and status != 200 else "ok" if ok else "FAIL"
    assert re.search(rf"^{state} +upstream test +GET /models answers {status}", ended.out, re.M), ended.out
    assert ended.code == (0 if ok else 1)


def test_healthcheck_asks_the_running_gateway(command: Command, gateway: Gateway) -> None:
    address = gateway.admin_url.removeprefix("http://")
    proxy = f"http://127.0.0.1:{free_port()}"
    ended = command.plain("healthcheck", "--admin-listen", address, http_proxy=proxy, HTTP_PROXY=proxy)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ready\n", "")
    anywhere = address.replace("127.0.0.1", "0.0.0.0")
    assert command.plain("healthcheck", "--admin-listen", anywhere).returncode == 0


def test_healthcheck_fails_where_nobody_listens(command: Command) -> None:
    ended = command.plain("healthcheck", "--admin-listen", f"127.0.0.1:{free_port()}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("quota-gateway: not ready: http://127.0.0.1:")
    assert ended.stderr.endswith("Connection refused\n")


def test_healthcheck_fails_on_a_gateway_that_is_not_ready(command: Command) -> None:
    class NotReady(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotReady) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            ended = command.plain("healthcheck", "--admin-listen", f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert ended.returncode == 1
    assert ended.stderr.endswith("/readyz: HTTP Error 503: Service Unavailable\n")


@pytest.mark.parametrize(
    ("option", "other", "setting"),
    [("--listen", "--admin-listen", "listen"), ("--admin-listen", "--listen", "admin.listen")],
)
def test_serve_says_which_address_is_taken(command: Command, option: str, other: str, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = command.run("serve", option, address, other, "127.0.0.1:0")
    assert (ended.returncode, ended.stdout) == (1, "")
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"quota-gateway: cannot listen on {address}: ")
    assert line.endswith(f"address already in use; choose another address with {option} or as {setting}")


def test_a_second_gateway_on_the_same_data_is_refused(command: Command, gateway: Gateway) -> None:
    ended = command.run("serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    assert (ended.returncode, ended.stdout) == (1, "")
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("quota-gateway: the data directory ")
    assert line.endswith(f"in use by another gateway (pid {gateway.pid})")


# --- with mistakes in the configuration -------------------------------------------------------------------------

#: A mistake in each part that has nothing to do with where the store is.
MISTAKES = {
    "listen": "nowhere",
    "limits": {"body": "huge"},
    "upstreams": {"test": {"base_url": "http://127.0.0.1:1/v1", "api_key": "${NOT_SET_ANYWHERE}"}},
    "models": {"price_unit": "usd_per_lightyear", "models": {}},
}


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Writes a configuration with the usual plans in which these parts are replaced; None for one that is left out."""

    def write(parts: Mapping[str, Any]) -> Path:
        path = tmp_path / "broken.yaml"
        places = {"store": {"url": "embedded"}, "archive": {"url": "sqlite"}}
        config = {**gateway_config("http://127.0.0.1:1/v1", ["m"]), **places, **parts}
        path.write_text(yaml.safe_dump({name: part for name, part in config.items() if part is not None}))
        return path

    return write


def test_a_key_can_be_revoked_whatever_else_is_wrong(
    store_with_alice: Path, broken: Callable[[Mapping[str, Any]], Path], here: Here
) -> None:
    path = broken({**MISTAKES, "plans": {"standard": {"allowance": "lots"}}})
    where = ("--config", str(path), "--data-dir", str(store_with_alice))
    mistakes = len(here.run("check-config", "--config", str(path)).err.splitlines()) - 1
    assert mistakes >= 5

    def run(*words: str) -> str:
        ended = here.run(*words, *where)
        assert ended.code == 0, ended.err
        assert ended.err == (
            f"quota-gateway: the configuration has {mistakes} mistakes, see `quota-gateway check-config`; "
            f"`{words[0]} {words[1]}` can do without what is wrong\n"
        )
        return ended.out

    key = json.loads(run("keys", "create", "alice", "--json"))["id"]
    assert key in run("keys", "list", "alice")
    assert run("keys", "revoke", key) == f"revoked {key} of account alice\n"
    assert run("reservations", "list") == "no open reservations\n"
    assert json.loads(run("ledger", "tail", "alice", "--json"))["data"]
    assert run("ledger", "export", "alice")
    assert run("ledger", "verify", "alice").startswith("ok: ")
    gone = here.run("reservations", "void", f"rsv_00{'0' * 24}", *where)
    assert gone.code == 1 and gone.err.endswith(f"quota-gateway: there is no reservation 'rsv_00{'0' * 24}'\n")

    # What is decided by plans cannot be done without them.
    for words in (("accounts", "list"), ("credits", "show", "alice"), ("accounts", "set-plan", "alice", "standard")):
        ended = here.run(*words, *where)
        assert (ended.code, ended.out) == (1, "")
        assert len(ended.err.splitlines()) == mistakes + 1
        assert ended.err.endswith(f"quota-gateway: the configuration has {mistakes} mistakes\n")


def test_plans_that_no_gateway_would_run_by_decide_nothing(
    store_with_alice: Path, broken: Callable[[Mapping[str, Any]], Path], here: Here
) -> None:
    """The plans themselves are sound; but a running gateway keeps its old ones as long as anything is wrong."""
    where = ("--config", str(broken(MISTAKES)), "--data-dir", str(store_with_alice))
    for words in (("accounts", "create", "bob"), ("accounts", "set-plan", "alice", "standard")):
        ended = here.run(*words, *where)
        assert (ended.code, ended.out) == (1, "")
        assert "mistakes" in ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    "parts",
    [
        {"store": {"url": "redis//typo"}},
        {"store": {"url": "${NOT_SET_ANYWHERE}"}},
        {"store": {"data_dri": "elsewhere"}},
        {"archive": {"url": "sqlite://relative"}},
        # Without a section of its own the store may be meant by what is wrong: a verb would go to the default one.
        {"store": None, "stoer": {"url": "redis://127.0.0.1:6379"}},
        {"store": None, "admin": {"store": {"url": "redis://127.0.0.1:6379"}}},
        {"store": None, "models": {"price_unit": "usd_per_token", "models": {}, "store": {}}},
    ],
    ids=str,
)
def test_no_verb_guesses_where_the_store_is(
    store_with_alice: Path, broken: Callable[[Mapping[str, Any]], Path], here: Here, parts: Mapping[str, Any]
) -> None:
    where = ("--config", str(broken(parts)), "--data-dir", str(store_with_alice))
    for words in (("keys", "list", "alice"), ("ledger", "verify"), ("reservations", "list"), ("accounts", "list")):
        ended = here.run(*words, *where)
        assert (ended.code, ended.out) == (1, "")
        assert "quota-gateway: the configuration has " in ended.err.splitlines()[-1]
        assert ended.err.splitlines()[-1].endswith(("1 mistake", "2 mistakes"))


def test_the_ledger_is_read_only_where_its_archive_is_said_to_be(
    store_with_alice: Path, broken: Callable[[Mapping[str, Any]], Path], here: Here
) -> None:
    misplaced = broken({"archive": None, "admin": {"archive": {"url": "sqlite:////elsewhere"}}})
    where = ("--config", str(misplaced), "--data-dir", str(store_with_alice))
    assert here.run("ledger", "verify", *where).code == 1
    assert here.run("keys", "list", "alice", *where).code == 0


def test_a_mistyped_plan_makes_no_store(tmp_path: Path, here: Here) -> None:
    ended = here.run("accounts", "create", "bob", "--plan", "typo", "--data-dir", str(tmp_path / "new"))
    assert ended.code == 1
    assert ended.err.startswith("quota-gateway: plan 'typo' is not in the configuration, which has ")
    assert not (tmp_path / "new").exists()


def test_an_export_that_fails_leaves_the_last_one(tmp_path: Path, here: Here) -> None:
    kept = tmp_path / "ledger.jsonl"
    kept.write_text("last month's\n")
    ended = here.run("ledger", "export", "--output", str(kept), "--data-dir", str(tmp_path / "nowhere"))
    assert ended.code == 1
    assert kept.read_text() == "last month's\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["ledger.jsonl"]


def test_a_store_that_is_written_twice_is_not_guessed_at(store_with_alice: Path, tmp_path: Path, here: Here) -> None:
    path = tmp_path / "twice.yaml"
    text = yaml.safe_dump(gateway_config("http://127.0.0.1:1/v1", ["m"]))
    for mistake in ("store: {}\nstore: {url: 'redis://127.0.0.1:1'}\n", "base: &base {}\n<<: *base\n"):
        path.write_text(text + mistake)
        ended = here.run("keys", "list", "alice", "--config", str(path), "--data-dir", str(store_with_alice))
        assert (ended.code, ended.out) == (1, "")
        assert f"{path}:" in ended.err


# --- ends that are not the verb's -------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(command: Command) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody_reads:
        ended = subprocess.run(
            [sys.executable, "-m", "gateway", "schema"],
            cwd=command.directory,
            env=environment(),
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_an_interrupt_ends_a_verb_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cast(dict[str, Any], cli.GATEWAY_VERBS), "schema", interrupted)
    assert cli.main(["schema"]) == 130
    assert capsys.readouterr() == ("", "")
