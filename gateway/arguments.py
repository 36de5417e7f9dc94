"""The words that the command line takes: what each verb needs, checked as far as it can be without looking anywhere.

``args.verb`` is the verb as it was typed, such as ``accounts create``; ``gateway/cli.py`` knows what runs it.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

from gateway import __version__
from gateway.credits.api_keys import check_key_name
from gateway.domain.money import parse_credits
from gateway.domain.names import check_account_name, check_operation_id, check_reason

if TYPE_CHECKING:
    from gateway.config.model import Address

#: What ``ledger tail`` prints at most: it is held in memory.
_MOST_LINES = 10_000
#: More processes than that are better spread over machines.
_MOST_WORKERS = 64

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong first, in the form of every other error, and how it is used after that."""

    def error(self, message: str) -> Never:
        """Exit with 2."""
        self.exit(2, f"quota-gateway: {message}\n{self.format_usage()}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments (default: the process's). Exits with 2 for a usage error."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="quota-gateway", description="Meters model APIs against plans and prepaid credits.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = _group(parser)
    _add_gateway_verbs(verbs)
    _add_prices(_group(verbs.add_parser("prices", help="models.yaml against a price list: diff, import")))

    _add_accounts(_group(verbs.add_parser("accounts", help="who pays: create, show, list, set-plan")))
    _add_keys(_group(verbs.add_parser("keys", help="what clients send: create, list, revoke")))
    _add_credits(_group(verbs.add_parser("credits", help="what is paid with: grant, refund, deduct, show")))
    _add_ledger(_group(verbs.add_parser("ledger", help="every movement of credits: tail, export, verify")))
    _add_reservations(_group(verbs.add_parser("reservations", help="what requests in flight hold: list, void")))
    return parser


def _add_accounts(group: Any) -> None:
    create = _operator_verb(group, "accounts create", "open an account", account=True)
    create.add_argument("--plan", help="default: the configuration's default plan")
    _operator_verb(group, "accounts show", "its plan, credits and number of keys", account=True)
    _operator_verb(group, "accounts list", "every account")
    set_plan = _operator_verb(group, "accounts set-plan", "move it to another plan at once", account=True)
    set_plan.add_argument("plan", metavar="PLAN")
    _add_operation_id(set_plan)
    set_plan.add_argument(
        "--version", type=_version, default=0, metavar="N", help="apply only if newer than the last (default: next)"
    )


def _add_keys(group: Any) -> None:
    create = _operator_verb(group, "keys create", "make a key and print its secret once", account=True)
    create.add_argument("--name", type=_checked(check_key_name), help="for people to tell keys apart")
    create.add_argument("--secret-file", metavar="FILE", help="import the secret in this file, - for standard input")
    create.add_argument(
        "--source", choices=("api", "chat"), default="api", help="what it is for, in the ledger (default: %(default)s)"
    )
    _operator_verb(group, "keys list", "an account's keys, without secrets", account=True)
    _add_id(_operator_verb(group, "keys revoke", "end a key at once"))


def _add_credits(group: Any) -> None:
    purposes = {
        "grant": "add prepaid credits",
        "refund": "give back what the balance was charged, or with --request what one request was charged",
        "deduct": "take prepaid credits away",
    }
    for kind, purpose in purposes.items():
        verb = _operator_verb(group, f"credits {kind}", purpose, account=True)
        verb.set_defaults(kind=kind)
        amount: dict[str, Any] = {"metavar": "AMOUNT", "type": _checked(parse_credits)}
        amount["help"] = "credits, such as 12.50"
        if kind == "refund":
            what = verb.add_mutually_exclusive_group(required=True)
            what.add_argument("amount", nargs="?", **amount)
            what.add_argument(
                "--request", metavar="ID", help="a request of the last 24 h, req_… or rsv_…: all of it, to its sources"
            )
        else:
            verb.add_argument("amount", **amount)
        _add_operation_id(verb)
        verb.add_argument("--reason", type=_checked(check_reason), default="", metavar="TEXT", help="for the ledger")
    _operator_verb(group, "credits show", "an account's allowance and balance", account=True)


def _add_reservations(group: Any) -> None:
    _add_optional_account(_operator_verb(group, "reservations list", "open reservations, of one account or all"))
    _add_id(
        _operator_verb(
            group, "reservations void", "give a reservation's hold back; the answer of a request in flight is then free"
        )
    )


def _add_ledger(group: Any) -> None:
    tail = _ledger_verb(group, "ledger tail", "an account's latest entries, oldest first")
    tail.add_argument("account", metavar="ACCOUNT", type=_checked(check_account_name))
    tail.add_argument(
        "-n", "--lines", type=_lines, default=20, metavar="N", help="how many, 0 to 10000 (default: %(default)s)"
    )
    tail.add_argument("--follow", action="store_true", help="go on with new entries as they are made")
    _add_json(tail)
    export = _ledger_verb(group, "ledger export", "all entries, of one account or all; those of an account in order")
    _add_optional_account(export)
    export.add_argument("--format", choices=("jsonl", "csv"), default="jsonl", help="default: %(default)s")
    moment = "such as 2027-03-10 or 2027-03-10T12:30:00Z"
    export.add_argument("--since", type=_checked(_moment), metavar="TIME", help=f"entries from then on, {moment}")
    export.add_argument("--until", type=_checked(_moment), metavar="TIME", help="entries before then")
    export.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    verify = _ledger_verb(group, "ledger verify", "sum the ledger up and compare; exit 1 when something does not agree")
    _add_optional_account(verify)
    _add_json(verify)


def _add_gateway_verbs(verbs: Any) -> None:
    serve = _verb(verbs, "serve", "run the gateway")
    serve.add_argument("--listen", type=_address, metavar="HOST:PORT", help="where clients connect")
    _add_admin_listen(serve)
    _add_data_dir(serve)
    serve.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="processes that answer, 1 to 64: one per core (default: %(default)s)",
    )
    _verb(verbs, "check-config", "name every mistake in the configuration")
    _verb(verbs, "schema", "print the configuration's JSON Schema")
    doctor = _verb(verbs, "doctor", "look at store, archive, upstreams, clocks and settings")
    _add_data_dir(doctor)
    _add_json(doctor)
    _add_admin_listen(_verb(verbs, "healthcheck", "exit 0 when the running gateway is ready"))


def _add_prices(group: Any) -> None:
    purposes = {"diff": "show what would change, and write nothing", "import": "show what changes, ask, and write it"}
    for kind, purpose in purposes.items():
        verb = _verb(group, f"prices {kind}", purpose)
        source = verb.add_mutually_exclusive_group(required=True)
        source.add_argument("--from-upstream", metavar="NAME", help="the list of an upstream of the configuration")
        source.add_argument("--from-file", type=Path, metavar="PATH", help="a price file in LiteLLM's form")
        verb.add_argument("--upstream", metavar="NAME", help="whose models the file's are (default: of any; no --add)")
        verb.add_argument(
            "--only", nargs="+", action="extend", default=[], metavar="PATTERN", help="models such as 'openai/*'"
        )
        verb.add_argument("--add", action="store_true", help="also take over models that models.yaml lacks")
        _add_json(verb)
        if kind == "import":
            verb.add_argument("--yes", action="store_true", help="write without asking")


def _group(parser: argparse.ArgumentParser) -> Any:
    return parser.add_subparsers(required=True, metavar="VERB")


def _verb(group: Any, verb: str, purpose: str) -> argparse.ArgumentParser:
    name = verb.rpartition(" ")[2]
    parser: argparse.ArgumentParser = group.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
    parser.set_defaults(verb=verb)
    parser.add_argument("--config", type=Path, metavar="PATH", help="gateway.yaml (default: the one that ships)")
    return parser


def _operator_verb(group: Any, verb: str, purpose: str, *, account: bool = False) -> argparse.ArgumentParser:
    parser = _verb(group, verb, purpose)
    if account:
        parser.add_argument("account", metavar="ACCOUNT", type=_checked(check_account_name))
    _add_data_dir(parser)
    _add_json(parser)
    return parser


def _ledger_verb(group: Any, verb: str, purpose: str) -> argparse.ArgumentParser:
    parser = _verb(group, verb, purpose)
    _add_data_dir(parser)
    return parser


def _add_optional_account(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("account", metavar="ACCOUNT", nargs="?", type=_checked(check_account_name))


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the embedded store's directory")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_admin_listen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--admin-listen", type=_address, metavar="HOST:PORT", help="where metrics and health are")


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", type=_checked(_ascii))


def _add_operation_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operation-id",
        type=_checked(check_operation_id),
        metavar="ID",
        help="the same id again does nothing again (default: a new one)",
    )


def _checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """The check as an argument's type; argparse hides a ValueError's text but shows this error's."""

    def convert(text: str) -> T:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _ascii(text: str) -> str:
    if not text.isascii():
        raise ValueError(f"{text[:40]!r} is not an id")
    return text


def _address(text: str) -> "Address":
    from gateway.config.fields import address  # noqa: PLC0415

    return _checked(address)(text)


def _version(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,14}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a version: a whole number from 1 to 10^15")
    return int(text)


def _lines(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > _MOST_LINES:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of entries from 0 to {_MOST_LINES}")
    return int(text)


def _moment(text: str) -> int:
    """Milliseconds since 1970; without a time zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a time such as 2027-03-10 or 2027-03-10T12:30:00Z") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", text) or not 1 <= int(text) <= _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of workers from 1 to {_MOST_WORKERS}")
    return int(text)
