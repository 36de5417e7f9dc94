"""What counts as a changed file, and how one configuration takes another's place."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.config import watch
from gateway.config.changes import Changes, changes, taken_over
from gateway.config.load import ConfigError, load
from gateway.config.model import GatewayConfig
from gateway.config.watch import LiveConfig, WatchedFiles

MAIN = "upstreams:\n  local: {base_url: http://127.0.0.1:8000/v1}\nplans: plans.yaml\nmodels: models.yaml\n"
PLANS = "plans:\n  free: {default: true, allowance: {per_window: 1, refresh: 24h}}\n"
MODELS = """price_unit: usd_per_million_tokens
models:
  tiny: {upstream: local, input_token_price: 1, output_token_price: 2, context_window: 4096, max_output_tokens: 512}
"""


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """The main file of a good configuration."""
    (tmp_path / "plans.yaml").write_text(PLANS, encoding="utf-8")
    (tmp_path / "models.yaml").write_text(MODELS, encoding="utf-8")
    main = tmp_path / "gateway.yaml"
    main.write_text(MAIN, encoding="utf-8")
    return main


def watched(main: Path) -> WatchedFiles:
    return WatchedFiles(load(main, {}).files)


def replace_file(file: Path, text: str) -> None:
    """As most editors save: a new file takes the name."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


# --- files ----------------------------------------------------------------------------------------------------------


def test_what_was_read_has_not_changed(main: Path) -> None:
    files = watched(main)
    assert not files.changed()
    assert not files.changed()


@pytest.mark.parametrize("name", ["gateway.yaml", "plans.yaml", "models.yaml"])
def test_every_file_is_watched(main: Path, name: str) -> None:
    files = watched(main)
    file = main.parent / name
    file.write_text(file.read_text(encoding="utf-8") + "# a word\n", encoding="utf-8")
    assert files.changed()
    assert files.changed(), "until it is read again"


def test_a_change_before_the_first_look_is_seen(main: Path) -> None:
    config = load(main, {})
    replace_file(main.parent / "plans.yaml", PLANS.replace("per_window: 1", "per_window: 2"))
    assert WatchedFiles(config.files).changed()


def test_a_change_that_keeps_size_and_time_is_seen(main: Path) -> None:
    files = watched(main)
    assert not files.changed()
    plans = main.parent / "plans.yaml"
    before = plans.stat()
    replace_file(plans, PLANS.replace("per_window: 1", "per_window: 2"))
    os.utime(plans, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.changed()


def test_a_file_that_is_written_again_as_it_was_has_not_changed(main: Path) -> None:
    files = watched(main)
    assert not files.changed()
    replace_file(main, MAIN)
    os.utime(main, ns=(1, 1))
    assert not files.changed()


def test_a_file_that_goes_and_comes_is_a_change_each_time(main: Path) -> None:
    files = watched(main)
    plans = main.parent / "plans.yaml"
    plans.rename(plans.with_suffix(".away"))
    assert files.changed()
    with pytest.raises(ConfigError) as caught:
        load(main, {})
    files = WatchedFiles(caught.value.files)
    assert not files.changed()
    plans.with_suffix(".away").rename(plans)
    assert files.changed()


def test_a_swapped_link_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes updates a ConfigMap: the files are links through a link to a directory, which is swapped."""
    for version in "12":
        directory = tmp_path / f"..v{version}"
        directory.mkdir()
        (directory / "gateway.yaml").write_text(MAIN, encoding="utf-8")
        (directory / "plans.yaml").write_text(PLANS.replace("per_window: 1", f"per_window: {version}"))
        (directory / "models.yaml").write_text(MODELS, encoding="utf-8")
    (tmp_path / "..data").symlink_to("..v1")
    for name in ("gateway.yaml", "plans.yaml", "models.yaml"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    files = watched(tmp_path / "gateway.yaml")
    assert not files.changed()
    (tmp_path / "..tmp").symlink_to("..v2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert files.changed()


def test_a_file_that_is_too_large_is_not_a_change_at_every_look(main: Path) -> None:
    main.write_text("#" * (2**20 + 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(main, {})
    files = WatchedFiles(caught.value.files)
    assert not files.changed()
    replace_file(main, MAIN)
    assert files.changed()


# --- changes --------------------------------------------------------------------------------------------------------


def edited(main: Path, name: str, old: str, new: str) -> GatewayConfig:
    """The configuration after an edit of one of its files."""
    file = main.parent / name
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    return load(main, {})


@pytest.mark.parametrize(
    ("name", "old", "new", "applied"),
    [
        ("plans.yaml", "per_window: 1", "per_window: 2", ("plans.free changed",)),
        ("plans.yaml", "free", "tiny", ("plans.free removed", "plans.tiny added", "default_plan changed")),
        ("models.yaml", "output_token_price: 2", "output_token_price: 3", ("models.tiny changed",)),
        ("models.yaml", "  tiny", "  small", ("models.tiny removed", "models.small added")),
        ("gateway.yaml", ":8000", ":8001", ("upstreams.local changed",)),
        ("gateway.yaml", "plans: p", "limits: {body: 1MiB}\nplans: p", ("limits changed",)),
        ("gateway.yaml", "plans: p", "admin: {token: abc}\nplans: p", ("admin.token changed",)),
        ("gateway.yaml", "plans: p", "# a word\nplans: p", ()),
    ],
)
def test_what_can_change_is_named(main: Path, name: str, old: str, new: str, applied: tuple[str, ...]) -> None:
    running = load(main, {})
    read = edited(main, name, old, new)
    found = changes(running, read)
    assert (found.applied, found.needs_restart) == (applied, ())
    assert found.removed_plans == (("free",) if new == "tiny" else ())
    assert taken_over(running, read) == read


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("listen: 127.0.0.1:7000", ("listen",)),
        ("admin: {listen: '127.0.0.1:7001'}", ("admin.listen",)),
        (
            "store: {url: 'redis://db', timeout: 1s, data_dir: /d, allow_unsafe: true}",
            ("store.url", "store.data_dir", "store.timeout", "store.allow_unsafe"),
        ),
        ("archive: {url: 'sqlite:///a'}", ("archive.url",)),
    ],
)
def test_what_needs_a_restart_is_named_and_stays_while_the_rest_changes(
    main: Path, line: str, fields: tuple[str, ...]
) -> None:
    running = load(main, {})
    edited(main, "plans.yaml", "per_window: 1", "per_window: 2")
    read = edited(main, "gateway.yaml", "plans: p", f"{line}\nplans: p")
    assert changes(running, read) == Changes(("plans.free changed",), fields, ())
    assert taken_over(running, read) == replace(running, plans=read.plans)


# --- taking over ----------------------------------------------------------------------------------------------------


class Live:
    """A LiveConfig whose applied configurations and verdicts a test can look at."""

    def __init__(self, main: Path) -> None:
        self.main = main
        self.applied: list[GatewayConfig] = []
        self.verdicts: list[bool] = []
        self.fails = False
        self.config = LiveConfig(load(main, {}), lambda: load(main, {}), self._apply, self.verdicts.append)

    async def _apply(self, config: GatewayConfig) -> None:
        if self.fails:
            raise OSError("no port is free")
        self.applied.append(config)

    async def verdict(self, count: int) -> None:
        """Wait for that many verdicts."""
        async with asyncio.timeout(20):
            while len(self.verdicts) < count:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.config.follow())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture
def live(main: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "REST_S", 0.05)
    return Live(main)


async def test_a_changed_file_is_taken_over(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.config.watch")
    async with live.following():
        replace_file(live.main.parent / "plans.yaml", PLANS.replace("per_window: 1", "per_window: 2"))
        await live.verdict(1)
    assert live.verdicts == [True]
    assert live.applied == [live.config.config] == [load(live.main, {})]
    assert "configuration reloaded: plans.free changed" in caplog.messages


async def test_a_bad_file_changes_nothing_until_it_is_mended(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    before = live.config.config
    plans = live.main.parent / "plans.yaml"
    async with live.following():
        replace_file(plans, PLANS.replace("per_window: 1", "per_window: much").replace("default", "defualt"))
        await live.verdict(1)
        await asyncio.sleep(0.2)
        assert live.verdicts == [False], "one reading for one change"
        assert live.config.config is before
        logged = [message for message in caplog.messages if message.startswith("configuration not reloaded: ")]
        assert [f"{plans}:{place}" in line for line, place in zip(logged, ("1:1", "2:10", "2:51"), strict=True)]
        replace_file(plans, PLANS)
        await live.verdict(2)
    assert live.verdicts == [False, True]
    assert live.config.config == before


async def test_files_that_change_together_are_taken_over_together(
    live: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two edits the model's upstream does not exist: nobody should hear of that."""
    monkeypatch.setattr(watch, "REST_S", 1.0)
    async with live.following():
        replace_file(live.main.parent / "models.yaml", MODELS.replace("local", "near"))
        await asyncio.sleep(0.1)  # several polls
        replace_file(live.main, MAIN.replace("local", "near"))
        await live.verdict(1)
    assert live.verdicts == [True]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_file_that_is_newly_named_is_watched(live: Live) -> None:
    more = live.main.parent / "more.yaml"
    async with live.following():
        more.write_text(PLANS, encoding="utf-8")
        replace_file(live.main, MAIN.replace("plans.yaml", "more.yaml"))
        await live.verdict(1)
        replace_file(more, PLANS.replace("free", "rich"))
        await live.verdict(2)
    assert live.config.config.default_plan == "rich"


async def test_a_failure_to_apply_leaves_the_old_one_and_is_tried_again(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    before = live.config.config
    live.fails = True
    async with live.following():
        replace_file(live.main.parent / "plans.yaml", PLANS.replace("free", "rich"))
        await live.verdict(2)
        assert live.verdicts[:2] == [False, False]
        assert live.config.config is before
        live.fails = False
        async with asyncio.timeout(20):
            while not live.applied:
                await asyncio.sleep(0.01)
    assert live.config.config.default_plan == "rich"
    assert "no port is free" in caplog.text


async def test_removed_plans_and_fields_that_need_a_restart_are_warned_of(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    replace_file(live.main.parent / "plans.yaml", PLANS.replace("free", "rich"))
    replace_file(live.main, "listen: 127.0.0.1:7000\n" + MAIN)
    assert await live.config.reload() == Changes(
        ("plans.free removed", "plans.rich added", "default_plan changed"), ("listen",), ("free",)
    )
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "plans removed: free; accounts on them are refused until set-plan moves them",
        "changed but not applied before a restart: listen",
    ]
    # It is still not what the file says.
    assert (await live.config.reload()).needs_restart == ("listen",)
    replace_file(live.main, MAIN)
    assert (await live.config.reload()) == Changes((), (), ())


async def test_reloads_at_once_happen_one_after_another(live: Live) -> None:
    replace_file(live.main.parent / "plans.yaml", PLANS.replace("free", "rich"))
    found = await asyncio.gather(*(live.config.reload() for _ in range(3)))
    assert [bool(one.applied) for one in found] == [True, False, False]
    assert live.verdicts == [True] * 3
