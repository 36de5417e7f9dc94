"""Delete each single line of the Lua scripts in turn and see that a test fails.

    python -m tests.mutation.lua_lines [--jobs 2] [--script settle] [--line 12]

Prints the lines that nobody misses and exits with 1 if there are any, with 2 if the run itself cannot be trusted.

No file of the checkout is changed. pytest collects the tests once; then every mutant gets a forked process with a
copy of the scripts, and a Valkey server of its own. Tests run in an order that is learnt on the way: most mutants
killed per second first. The first failure ends the process at once, fixtures and all; what it leaves is cleared away
from outside. Unless a script itself broke, or the state machine got a wrong answer, only a test that fails twice has
missed the line: on a busy machine one may fail by chance.
"""

import argparse
import contextlib
import importlib.resources
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from hypothesis import Phase, settings

from gateway.credits import store
from tests.servers import ValkeyServer, valkey_server

ROOT = Path(__file__).parents[2]
LUA = ROOT / "gateway/credits/lua"
TESTS = sorted(
    str(path)
    for pattern in ("test_lua_libraries.py", "test_scripts_contract.py", "test_engine*.py")
    for path in (ROOT / "tests/integration").glob(pattern)
)

#: Lines without which the scripts do the same, and why: (file, the line's text without its indentation) → reason.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "lib/reservation.lua",
        "if amount then return {{amount = amount + 0, at = at, "
        "spans = {{refresh = refresh + 0, epoch = epoch + 0}}}} end",
    ): "the loops below it read the same, at three times the cost",
}

#: A mutant may take this much longer than no mutant; scripts that never end are killed by it.
TIMEOUT = "the timeout"
TIMEOUT_FACTOR, TIMEOUT_LEAST_S = 5, 120
PROGRESS_EVERY = 50
NEIGHBOURS_WEIGHT = 5


@dataclass(frozen=True)
class Line:
    """A line of a script. number: from 1."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}"


@dataclass
class Mutant:
    """The scripts with something missing; line is None for the two that check the run itself.

    suspect: the test that has failed once; seconds: what each test took.
    """

    scripts: dict[str, str]
    line: Line | None = None
    killed_by: str | None = None
    suspect: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Child:
    """A process that runs the tests on a mutant. directory: all that it writes."""

    mutant: Mutant
    pid: int
    pipe: int
    directory: Path
    deadline: float
    said: bytes = b""


class MutationError(Exception):
    """The run says nothing about the tests; the text says why."""


# --- lines ----------------------------------------------------------------------------------------------------------


def read_scripts() -> dict[str, str]:
    """Every script's text by its path below ``lua``."""
    return {str(path.relative_to(LUA)): path.read_text() for path in sorted(LUA.rglob("*.lua"))}


def code_lines(file: str, text: str) -> Iterator[Line]:
    """The lines that are not blank and not only comment. Includes and the first line are code."""
    in_comment = False
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        in_comment = in_comment or stripped.startswith("--[[")
        comment_only = in_comment or (stripped.startswith("--") and not stripped.startswith("--#include"))
        if stripped and not comment_only:
            yield Line(file, number, stripped)
        if in_comment and "]]" in stripped:
            in_comment = False


def without(scripts: dict[str, str], line: Line) -> Mutant:
    """The scripts without the line."""
    lines = scripts[line.file].splitlines(keepends=True)
    del lines[line.number - 1]
    return Mutant({**scripts, line.file: "".join(lines)}, line)


# --- one mutant, in its own process ---------------------------------------------------------------------------------


class Verdict:
    """The plugin that tells the parent how a test went, and ends the process when one fails."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def say(self, **message: object) -> None:
        """One line to the parent."""
        os.write(self._pipe, json.dumps(message).encode() + b"\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.say(killed_by=report.nodeid, seconds=report.duration, certain=is_certain(report))
            end_group()
        if report.when == "call":
            self.say(passed=report.nodeid, seconds=report.duration)


def is_certain(report: pytest.TestReport) -> bool:
    """Whether the test would fail again: a script itself broke, or calls in a fixed order got a wrong answer."""
    text = report.longreprtext
    by_chance = "StoreUnavailable" in text or "Timeout" in text
    return "user_script" in text or ("test_engine_model.py" in report.nodeid and not by_chance)


def try_mutant(mutant: Mutant, directory: Path, pipe: int, items: list[pytest.Item], loader: ValkeyServer) -> NoReturn:
    """Run the tests, in the order given, on the mutant."""
    os.setpgid(0, 0)
    verdict = Verdict(pipe)
    try:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = str(directory)
        with (directory / "output").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        use_scripts(mutant.scripts, directory / "package")
        for name in store.SCRIPTS:
            try:
                loader.command("SCRIPT", "LOAD", store.load_script(name).text)
            except redis.ResponseError:
                verdict.say(killed_by=f"{name} does not load", seconds=0)
                end_group()
        items[0].config.pluginmanager.register(verdict)
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        verdict.say(survived=True)
    except BaseException:
        verdict.say(error=traceback.format_exc())
    finally:
        end_group()


def end_group() -> NoReturn:
    """End this process and the servers that it started, at once."""
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("still alive")


def use_scripts(scripts: dict[str, str], package: Path) -> None:
    """Make whoever looks for the scripts among the package's files find these."""
    for file, text in scripts.items():
        path = package / "lua" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    real_files = importlib.resources.files

    def files(anchor: str) -> Traversable:
        return package if anchor == "gateway.credits" else real_files(anchor)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("files") is real_files:
            module.files = files  # type: ignore[attr-defined]


# --- all of them ----------------------------------------------------------------------------------------------------


class Runner:
    """The pytest plugin that runs the mutants in the place of the collected tests."""

    def __init__(self, scripts: dict[str, str], lines: list[Line], jobs: int, *, verbose: bool) -> None:
        self._scripts = scripts
        self._lines = lines
        self._jobs = jobs
        self._verbose = verbose
        self._timeout_s: float = 600
        self._kills: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._directory = Path()
        self.mutants: list[Mutant] = []
        self.error: MutationError | None = None

    def pytest_collection(self) -> None:
        # The first counter-example will do: nobody reads it, so it need not be made small. Loaded after the suite's
        # own profile and before the test modules, whose settings inherit from it.
        phases = [phase for phase in Phase if phase not in {Phase.shrink, Phase.explain}]
        settings.register_profile("mutation", settings.get_profile("suite"), phases=phases, report_multiple_bugs=False)
        settings.load_profile("mutation")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            if session.testsfailed or not session.items:
                raise MutationError("the tests cannot be collected")
            with (
                tempfile.TemporaryDirectory(prefix="qg-mutants-") as directory,
                valkey_server() as loader,
            ):
                self._directory = Path(directory)
                self._check_run(session.items, loader)
                self._try_all([without(self._scripts, line) for line in self._lines], session.items, loader)
        except MutationError as error:
            self.error = error
        return True

    def _check_run(self, items: list[pytest.Item], loader: ValkeyServer) -> None:
        """The tests must pass on the scripts as they are, and must see what is done to them."""
        whole = Mutant(self._scripts)
        self._try_all([whole], items, loader)
        if whole.killed_by:
            raise MutationError(f"on the scripts as they are {whole.killed_by} fails")
        self._timeout_s = max(TIMEOUT_LEAST_S, TIMEOUT_FACTOR * sum(whole.seconds.values()))
        empty = Mutant(dict.fromkeys(self._scripts, "return {}\n"))
        self._try_all([empty], items, loader)
        if not empty.killed_by:
            raise MutationError("the tests do not use the scripts that are put before them")

    def _try_all(self, mutants: list[Mutant], items: list[pytest.Item], loader: ValkeyServer) -> None:
        waiting, children = list(reversed(mutants)), dict[int, Child]()
        started, ended = time.monotonic(), 0
        selector = selectors.DefaultSelector()
        try:
            while waiting or children:
                while waiting and len(children) < self._jobs:
                    child = self._fork(waiting.pop(), items, loader)
                    children[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                for child in self._ended(selector, children):
                    selector.unregister(child.pipe)
                    del children[child.pipe]
                    self._clear_away(child)
                    if not self._judge(child):
                        waiting.append(child.mutant)
                        continue
                    ended += 1
                    if len(mutants) > 1 and (self._verbose or ended % PROGRESS_EVERY == 0):
                        line = f"{child.mutant.line}: {child.mutant.killed_by or 'SURVIVED'}; " if self._verbose else ""
                        print(f"{line}{ended}/{len(mutants)} after {time.monotonic() - started:.0f} s", flush=True)
        finally:
            for child in children.values():
                self._clear_away(child)

    def _in_order(self, mutant: Mutant, items: list[pytest.Item]) -> list[pytest.Item]:
        def kills_per_second(item: pytest.Item) -> float:
            kills = self._kills[item.nodeid, ""]
            if mutant.line:  # what killed the neighbours is the likeliest
                kills += NEIGHBOURS_WEIGHT * self._kills[item.nodeid, mutant.line.file]
            return (kills + 0.5) / (self._seconds[item.nodeid] + 0.01)

        return sorted(items, key=lambda item: (item.nodeid == mutant.suspect, kills_per_second(item)), reverse=True)

    def _fork(self, mutant: Mutant, items: list[pytest.Item], loader: ValkeyServer) -> Child:
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        in_order = self._in_order(mutant, items)
        sys.stdout.flush()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try_mutant(mutant, directory, writing, in_order, loader)
        os.close(writing)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # the child does so too: whoever is first
        return Child(mutant, pid, reading, directory, time.monotonic() + self._timeout_s)

    def _ended(self, selector: selectors.BaseSelector, children: dict[int, Child]) -> list[Child]:
        """Read what the children say; those that have ended, or have had their time."""
        ended = []
        for key, _ in selector.select(timeout=1):
            child = children[key.fd]
            if said := os.read(child.pipe, 65536):
                child.said += said
            else:
                ended.append(child)
        late = [child for child in children.values() if child.deadline < time.monotonic() and child not in ended]
        for child in late:
            child.said += json.dumps({"killed_by": TIMEOUT, "seconds": 0}).encode()
        return ended + late

    def _clear_away(self, child: Child) -> None:
        # Before the child is waited for: until then nobody else can have its number.
        os.killpg(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.pipe)
        shutil.rmtree(child.directory, ignore_errors=True)

    def _judge(self, child: Child) -> bool:
        """Whether it is certain what became of the mutant."""
        mutant = child.mutant
        messages = [json.loads(line) for line in child.said.splitlines()]
        last = messages[-1] if messages else {}
        if "error" in last or not {"killed_by", "survived"} & last.keys():
            raise MutationError(f"the process of {mutant.line} failed: {last.get('error', 'it said nothing')}")
        killed_by = last.get("killed_by")
        for message in messages:
            if test := message.get("passed"):
                mutant.seconds[test] = message["seconds"]
                self._seconds[test] += message["seconds"]
        if killed_by and "::" in killed_by and not last["certain"] and killed_by != mutant.suspect:
            mutant.suspect = killed_by
            return False
        mutant.killed_by = killed_by
        if mutant.line is not None:
            self.mutants.append(mutant)
            if killed_by:
                self._seconds[killed_by] += last["seconds"]
                self._kills[killed_by, ""] += 1
                self._kills[killed_by, mutant.line.file] += 1
        return True


# --- the command ----------------------------------------------------------------------------------------------------


def chosen_lines(scripts: dict[str, str], script: str | None, number: int | None) -> list[Line]:
    """The lines to try. script: a file's path below ``lua`` or its name, with or without .lua."""
    return [
        line
        for file, text in scripts.items()
        if script is None or script in {file, Path(file).name, Path(file).stem}
        for line in code_lines(file, text)
        if number is None or line.number == number
    ]


def report(mutants: list[Mutant]) -> int:
    """Print what came of it; the exit code."""
    outcomes = {mutant.line: mutant.killed_by for mutant in mutants if mutant.line}
    survived = {line for line, killed_by in outcomes.items() if not killed_by}
    equivalent = {line for line in outcomes if (line.file, line.text) in EQUIVALENT}
    for line in sorted(survived - equivalent, key=lambda line: (line.file, line.number)):
        print(f"survived  {line}")
    for line in equivalent - survived:
        print(f"not equivalent, {outcomes[line]} misses it  {line}")
    timeouts = sum(killed_by == TIMEOUT for killed_by in outcomes.values())
    print(
        f"{len(outcomes)} lines, {len(outcomes) - len(survived)} killed ({timeouts} by {TIMEOUT}), "
        f"{len(survived - equivalent)} survived, {len(survived & equivalent)} equivalent"
    )
    return int(survived != equivalent)


def main() -> int:
    parser = argparse.ArgumentParser(description="Delete each line of the Lua scripts and see that a test fails.")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--script", help="only this file below gateway/credits/lua")
    parser.add_argument("--line", type=int, help="only the line with this number")
    arguments = parser.parse_args()

    scripts = read_scripts()
    lines = chosen_lines(scripts, arguments.script, arguments.line)
    if not lines:
        parser.error("there is no such line of code")
    if gone := EQUIVALENT.keys() - {(line.file, line.text) for line in chosen_lines(scripts, None, None)}:
        parser.error(f"EQUIVALENT names lines that are gone: {sorted(gone)}")
    runner = Runner(scripts, lines, arguments.jobs, verbose=arguments.script is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clear away what runs, as after ctrl-C
    pytest.main(["-q", "-s", "--assert=plain", "-p", "no:cacheprovider", "-m", "not long", *TESTS], plugins=[runner])
    if runner.error or len(runner.mutants) < len(lines):
        print(f"error: {runner.error or 'the run was cut short'}", file=sys.stderr)
        return 2
    return report(runner.mutants)


if __name__ == "__main__":
    sys.exit(main())
