"""The command line: what runs each verb, errors and exit codes; the verbs that concern the gateway itself.

The words that it takes are in ``gateway/arguments.py``, the operator's verbs in ``gateway/verbs.py``. Imports stand
inside the functions that need them, because ``--help``, ``schema`` and a health probe every few seconds need neither
HTTP nor store.
"""

import asyncio
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gateway.arguments import parse
from gateway.config.problem import ConfigError
from gateway.credits.api_keys import check_secret
from gateway.credits.embedded import EmbeddedStoreError
from gateway.credits.errors import EngineError, StoreError, UnknownPlan

if TYPE_CHECKING:
    from gateway.config.load import OperatorConfig
    from gateway.config.model import GatewayConfig, StoreConfig
    from gateway.output import Answer

PROBE_TIMEOUT_S = 3.0
#: The longest secret is 256 characters; no more of a wrong file is read than shows that it is wrong.
_SECRET_FILE_BYTES = 1024


class CommandError(Exception):
    """What the command line itself has to say about a mistake."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. argparse itself exits with 2 for a usage error."""
    args = parse(argv)
    try:
        code = _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough. The interpreter flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _fail(f"the configuration has {_mistakes(error.problems)}")
    except (CommandError, EngineError, StoreError, EmbeddedStoreError) as error:
        return _fail(str(error))
    return code


def _run(args: Namespace) -> int:
    if run := GATEWAY_VERBS.get(args.verb):
        return run(args)
    return _ledger(args) if args.verb.startswith("ledger ") else _operate(args)


def _fail(message: str) -> int:
    print(f"quota-gateway: {message}", file=sys.stderr)
    return 1


def _mistakes(problems: Sequence[object]) -> str:
    return f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"


# --- verbs of the gateway ---------------------------------------------------------------------------------------


def _config(args: Namespace) -> "GatewayConfig":
    """The configuration with what the command line says instead."""
    from gateway.config.load import load  # noqa: PLC0415

    config = load(args.config)
    config = replace(config, store=_store(config.store, args))
    if getattr(args, "listen", None):
        config = replace(config, listen=args.listen)
    if getattr(args, "admin_listen", None):
        config = replace(config, admin=replace(config.admin, listen=args.admin_listen))
    return config


def _store(config: "StoreConfig", args: Namespace) -> "StoreConfig":
    return replace(config, data_dir=args.data_dir) if getattr(args, "data_dir", None) else config


def _serve(args: Namespace) -> int:
    from gateway.app import serve  # noqa: PLC0415
    from gateway.credits.journal import JournalError  # noqa: PLC0415
    from gateway.lifetime import event_loop_factory  # noqa: PLC0415
    from gateway.listening import ListenError  # noqa: PLC0415
    from gateway.telemetry.logs import setup_logging  # noqa: PLC0415
    from gateway.workers.team import WorkerFailed  # noqa: PLC0415

    config = _config(args)
    setup_logging("info")
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(serve(config, lambda: _config(args), args.workers))
    except (ListenError, JournalError, WorkerFailed) as error:
        raise CommandError(str(error)) from error
    return 0


def _check_config(args: Namespace) -> int:
    config = _config(args)
    upstreams = ", ".join(config.upstreams)
    answering = f"the demo model answers, because no upstream has a key ({upstreams})" if config.demo else upstreams
    plans = ", ".join(f"{name} (default)" if name == config.default_plan else name for name in config.plans)
    print(f"ok: plans {plans}; {len(config.models)} models; upstreams: {answering}")
    return 0


def _schema(_: Namespace) -> int:
    from gateway.config.schema import json_schema  # noqa: PLC0415

    print(json.dumps(json_schema(), indent=2))
    return 0


def _doctor(args: Namespace) -> int:
    from gateway.doctor import diagnose  # noqa: PLC0415
    from gateway.output import findings_answer  # noqa: PLC0415

    return _print(findings_answer(asyncio.run(diagnose(_config(args)))), args)


def _healthcheck(args: Namespace) -> int:
    from http.client import HTTPException  # noqa: PLC0415
    from urllib.error import URLError  # noqa: PLC0415
    from urllib.request import ProxyHandler, build_opener  # noqa: PLC0415

    address = _config(args).admin.listen
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    url = f"http://{replace(address, host=reachable)}/readyz"
    # Without the proxies of the environment: this asks our own machine.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_TIMEOUT_S) as answer:
            status = answer.status
    except (OSError, HTTPException) as error:  # an HTTPError and a timeout are OSErrors too
        reason = error.reason if type(error) is URLError else error
        raise CommandError(f"not ready: {url}: {reason}") from error
    if status != 200:
        raise CommandError(f"not ready: {url}: answers {status}")
    print("ready")
    return 0


def _prices(args: Namespace) -> int:
    from gateway.pricebook.book import BookError  # noqa: PLC0415
    from gateway.pricebook.sources import SourceError  # noqa: PLC0415
    from gateway.pricebook.verbs import PRICE_VERBS, PricesError  # noqa: PLC0415

    try:
        return 0 if PRICE_VERBS[args.verb](args) else 1
    except (BookError, SourceError, PricesError) as error:
        raise CommandError(str(error)) from error


#: By the words that are typed; what is not here works on a store.
GATEWAY_VERBS: Mapping[str, Callable[[Namespace], int]] = {
    "serve": _serve,
    "check-config": _check_config,
    "schema": _schema,
    "doctor": _doctor,
    "healthcheck": _healthcheck,
    "prices diff": _prices,
    "prices import": _prices,
}


# --- verbs of the operator --------------------------------------------------------------------------------------


def _operator_config(args: Namespace, *, plans: bool = False, archive: bool = False) -> "OperatorConfig":
    """What a verb needs of the configuration; plans, archive: whether that includes those. Says so where there are
    mistakes that it can do without. Raises ConfigError."""
    from gateway.config.load import load_for_operator  # noqa: PLC0415

    config = load_for_operator(args.config)
    if config.problems:
        if plans or (archive and config.archive is None):
            raise ConfigError(config.problems)
        print(
            f"quota-gateway: the configuration has {_mistakes(config.problems)}, see `quota-gateway check-config`; "
            f"`{args.verb}` can do without what is wrong",
            file=sys.stderr,
        )
    return replace(config, store=_store(config.store, args))


def _operate(args: Namespace) -> int:
    """Run an operator's verb on the store and print its answer."""
    from gateway.verbs import MAKE_STORES, NEED_PLANS, VERBS  # noqa: PLC0415

    config = _operator_config(args, plans=args.verb in NEED_PLANS)
    wanted = getattr(args, "plan", None)
    if args.verb in MAKE_STORES and wanted is not None and wanted not in (config.plans or ()):
        raise CommandError(
            f"{UnknownPlan(wanted)}, which has {', '.join(config.plans or ())}"
        )  # before there is a store
    # Read before a store is started for nothing.
    args.secret = _read_secret(args.secret_file) if getattr(args, "secret_file", None) is not None else None

    async def run() -> "Answer":
        from gateway.sessions import operator_session  # noqa: PLC0415

        async with operator_session(config, create=args.verb in MAKE_STORES) as operator:
            return await VERBS[args.verb](operator, args)

    try:
        return _print(asyncio.run(run()), args)
    except UnknownPlan as error:
        raise CommandError(f"{error}, which has {', '.join(config.plans or ())}") from error


def _ledger(args: Namespace) -> int:
    """Run a verb that reads the ledger; it prints as it goes."""
    from gateway.verbs import LEDGER_VERBS  # noqa: PLC0415

    config = _operator_config(args, archive=True)
    path: Path | None = getattr(args, "output", None)

    async def run(output: TextIO) -> bool:
        from gateway.sessions import audit_session  # noqa: PLC0415

        async with audit_session(config) as auditor:
            return await LEDGER_VERBS[args.verb](auditor, args, output)

    if path is None:
        return 0 if asyncio.run(run(sys.stdout)) else 1
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # What was there before stays until all is written.
        with unfinished.open("x", encoding="utf-8", newline="") as file:  # csv has line ends of its own
            ended_well = asyncio.run(run(file))
        unfinished.replace(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return 0 if ended_well else 1


def _print(answer: "Answer", args: Namespace) -> int:
    print(answer.rendered(as_json=args.json))
    return 0 if answer.ok else 1


def _read_secret(name: str) -> str:
    """The file's text without the newline that editors and echo put at its end."""
    try:
        if name == "-":
            content = sys.stdin.buffer.read(_SECRET_FILE_BYTES)
        else:
            with Path(name).open("rb") as file:
                content = file.read(_SECRET_FILE_BYTES)
    except OSError as error:
        raise CommandError(f"cannot read the secret from {name}: {error.strerror}") from error
    text = content.decode("ascii", "replace").removesuffix("\n").removesuffix("\r")
    try:
        return check_secret(text)
    except ValueError as error:
        raise CommandError(str(error)) from error
