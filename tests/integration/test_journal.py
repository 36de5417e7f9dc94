"""What the settlement journal promises: an entry whose ``add`` has returned is replayed, whatever happens after."""

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.credits.journal import MAX_FILE_BYTES, Journal, JournalEntry, JournalError

SETTLE = JournalEntry(
    verb="settle",
    account="acme",
    reservation="rsv_00_000000000000000000000001",
    cost_payg_nano=1_234_567_890,
    cost_plan_nano=1_111_111_101,
    note='{"price": "0a1b2c3d", "tokens": {"input": 12}}\n"ü"',
    plan="developer",
    rate_ppm=900_000,
    payg=True,
    created_ms=1_800_000_000_123,
    key_id="0123456789abcdef01234567",
    model="large",
)

#: Adds entries for ever, ten at a time, and says which are on disk; marks every third one done.
CHILD = """
import asyncio, sys
from pathlib import Path
from gateway.credits.journal import Journal, JournalEntry

async def main():
    journal = Journal(Path(sys.argv[1]))
    await journal.open()

    async def worker(which):
        number = 0
        while True:
            number += 1
            name = f"{which}-{number}"
            await journal.add(JournalEntry("void", "acme", name, note="x" * (number % 50) * 100))
            if number % 3 == 0:
                print("finishing", name, flush=True)
                await journal.done(name)
            else:
                print("added", name, flush=True)

    await asyncio.gather(*(worker(which) for which in range(10)))

asyncio.run(main())
"""


def void(number: int, note: str = "") -> JournalEntry:
    """One of many."""
    return JournalEntry("void", "acme", f"rsv_{number}", note=note)


def ids(entries: list[JournalEntry]) -> list[str]:
    """The entries' reservations."""
    return [entry.reservation for entry in entries]


def journal_files(directory: Path) -> list[Path]:
    """The files that a later process would look at."""
    return sorted(directory.glob("*.journal"))


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Journal]:
    """A journal that is closed, as by a process that ends."""
    journal = Journal(directory)
    await journal.open()
    try:
        yield journal
    finally:
        await journal.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal"


@contextlib.contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """Writing beyond size_bytes of any file fails, part of the write having been done: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what is replayed -----------------------------------------------------------------------------------------------


async def test_the_next_process_gets_every_entry_as_it_was(directory: Path) -> None:
    async with opened(directory) as journal:
        await journal.add(SETTLE)
        await journal.add(void(2))
        assert journal.pending == 2
    async with opened(directory) as journal:
        assert await journal.adopt() == [SETTLE, void(2)]
        assert journal.pending == 2
        assert await journal.adopt() == []  # they are ours now


async def test_what_is_done_is_not_replayed(directory: Path) -> None:
    async with opened(directory) as journal:
        for number in (1, 2, 3):
            await journal.add(void(number))
        await journal.done("rsv_2")
        await journal.done("rsv_never_added")
        assert journal.pending == 2
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_3"]
        await journal.done("rsv_1")
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_3"]


async def test_files_are_adopted_oldest_first(directory: Path) -> None:
    for number in (1, 2, 3):
        async with opened(directory) as journal:
            await journal.add(void(number))
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_2", "rsv_3"]


async def test_nothing_is_left_behind_when_all_is_done(directory: Path) -> None:
    async with opened(directory) as journal:
        await journal.add(void(1))
    async with opened(directory) as journal:
        await journal.adopt()
        await journal.add(void(2))
        assert len(journal_files(directory)) == 2
        await journal.done("rsv_1")
        assert len(journal_files(directory)) == 1
        await journal.done("rsv_2")
        assert journal.pending == 0
    assert list(directory.iterdir()) == []


async def test_a_file_whose_entries_get_done_does_not_grow(directory: Path) -> None:
    async with opened(directory) as journal:
        (file,) = journal_files(directory)
        for number in range(20):
            await journal.add(void(number))
            await journal.done(f"rsv_{number}")
            assert file.stat().st_size == 0


async def test_an_entry_that_never_gets_done_does_not_let_the_files_grow_for_ever(directory: Path) -> None:
    note = "x" * (MAX_FILE_BYTES // 8)
    async with opened(directory) as journal:
        await journal.add(void(0))
        for number in range(1, 40):
            await journal.add(void(number, note))
            await journal.done(f"rsv_{number}")
        assert sum(file.stat().st_size for file in journal_files(directory)) < 2 * MAX_FILE_BYTES
    async with opened(directory) as journal:
        assert await journal.adopt() == [void(0)]


async def test_only_the_owner_can_read_the_journal(directory: Path) -> None:
    async with opened(directory) as journal:
        await journal.add(SETTLE)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert [file.stat().st_mode & 0o777 for file in journal_files(directory)] == [0o600]


async def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = Journal(tmp_path / "file" / "journal")
    with pytest.raises(JournalError, match=r"file/journal cannot be opened: "):
        await journal.open()
    await journal.close()


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines_before_the_kill", [1, 7, 40, 150, 400])
async def test_every_entry_on_disk_survives_a_killed_process(directory: Path, lines_before_the_kill: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(directory)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines_before_the_kill)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()  # what it had said and nobody had read yet
    words = [line.split() for line in said if line.endswith("\n")]
    added = {name for verb, name in words if verb == "added"}
    async with opened(directory) as journal:
        replayed = ids(await journal.adopt())
    assert added <= set(replayed)
    # Beyond that at most one of each worker: its add, or its mark, was on its way.
    assert len(replayed) == len(set(replayed))
    assert len(set(replayed) - added) <= 10


async def test_the_files_of_a_live_process_are_left_alone(directory: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(directory)], stdout=subprocess.PIPE, text=True)
    with child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            async with opened(directory) as journal:
                for _ in range(5):
                    child.stdout.readline()
                    assert await journal.adopt() == []
            assert len(journal_files(directory)) == 1
        finally:
            child.kill()


async def test_of_two_that_adopt_at_once_one_gets_each_file(directory: Path) -> None:
    for number in range(20):
        async with opened(directory) as journal:
            await journal.add(void(number))
    async with opened(directory) as one, opened(directory) as other:
        both = await asyncio.gather(one.adopt(), other.adopt())
        assert sorted(ids(both[0] + both[1])) == sorted(f"rsv_{number}" for number in range(20))


# --- damage ---------------------------------------------------------------------------------------------------------


async def test_a_torn_line_costs_no_other_and_keeps_the_file(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(directory) as journal:
        for number in (1, 2, 3):
            await journal.add(void(number))
    (file,) = journal_files(directory)
    torn = file.read_bytes()[:-10]
    file.write_bytes(torn)

    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_2"]
        assert f"{file}, line 3: torn or corrupt" in caplog.text
        await journal.done("rsv_1")  # its mark must not become part of the torn line
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_2"]
        await journal.done("rsv_2")
    assert [path.name for path in directory.iterdir()] == [f"{file.name}.damaged"]
    assert next(directory.iterdir()).read_bytes().startswith(torn)
    async with opened(directory) as journal:
        assert await journal.adopt() == []


@pytest.mark.parametrize(
    "line",
    [
        b"00000000 {}",
        b"",
        b"\0" * 100,
        b"\xff\r\x0b",
        b'3f7a2b91 {"verb":"void","account":"acme","reservation":"rsv_9"}',
        b'108f95ca {"a field of another version":1}',
    ],
)
async def test_a_corrupt_line_is_named_and_costs_no_other(
    directory: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    async with opened(directory) as journal:
        for number in (1, 2):
            await journal.add(void(number))
    (file,) = journal_files(directory)
    first, second, _ = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([first, line, second, b""]))
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_2"]
        assert [record.getMessage() for record in caplog.records] == [
            f"{file}, line 2: torn or corrupt, skipped; the file is kept as {file}.damaged"
        ]


async def test_a_file_that_cannot_be_read_does_not_keep_the_others_back(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(directory) as journal:
        await journal.add(void(1))
    (directory / "0.journal").mkdir()
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1"]
    assert "0.journal cannot be read" in caplog.text


async def test_an_empty_file_of_a_dead_process_goes(directory: Path) -> None:
    async with opened(directory) as journal:
        (directory / "0.journal").touch()
        assert await journal.adopt() == []
        assert "0.journal" not in {path.name for path in journal_files(directory)}


# --- a full disk ----------------------------------------------------------------------------------------------------


async def test_a_full_disk_is_told_and_spoils_neither_what_was_written_nor_what_comes(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(directory) as journal:
        await journal.add(void(1))
        with files_limited_to(1000):
            with pytest.raises(JournalError, match=r"journal cannot be written: .*File too large"):
                await journal.add(void(2, "x" * 2000))
            assert journal.pending == 1
            await journal.add(void(3))
        await journal.add(void(4, "x" * 2000))
        assert journal.pending == 3
    caplog.clear()
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_3", "rsv_4"]
        assert caplog.records == []


def failing(fd: int) -> None:
    """What a broken disk does."""
    raise OSError(errno.EIO, "Input/output error")


async def test_after_a_failed_sync_another_file_is_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(directory) as journal:
        await journal.add(void(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(JournalError, match="Input/output error"):
                await journal.add(void(2))
        await journal.add(void(3))
        assert len(journal_files(directory)) == 2
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1", "rsv_3"]


async def test_what_gets_done_on_a_full_disk_is_done(directory: Path) -> None:
    async with opened(directory) as journal:
        await journal.add(void(1))
        await journal.add(void(2))
        with files_limited_to(journal_files(directory)[0].stat().st_size + 5):
            await journal.done("rsv_1")
            assert journal.pending == 1
            await journal.done("rsv_2")
        assert journal.pending == 0
    assert list(directory.iterdir()) == []


# --- many at once ---------------------------------------------------------------------------------------------------


async def test_those_who_wait_share_a_sync(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (syncs.append(fd), sync(fd))[1])
    async with opened(directory) as journal:
        syncs.clear()
        await asyncio.gather(*(journal.add(void(number)) for number in range(200)))
        assert 1 <= len(syncs) <= 2
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == [f"rsv_{number}" for number in range(200)]


async def test_a_cancelled_caller_neither_loses_nor_doubles_an_entry(directory: Path) -> None:
    async with opened(directory) as journal:
        for pause_s in (0, 0, 0.0001, 0.0005, 0.001, 0.002):
            callers = [asyncio.create_task(journal.add(void(number))) for number in range(50)]
            await asyncio.sleep(pause_s)
            for caller in callers[::2]:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await journal.add(void(50))
            assert journal.pending == 51
            lines = [line for file in journal_files(directory) for line in file.read_bytes().splitlines()]
            assert len(lines) == journal.pending
            for number in range(51):
                await journal.done(f"rsv_{number}")
            assert journal.pending == 0


async def test_adding_and_finishing_side_by_side(directory: Path) -> None:
    async with opened(directory) as journal:

        async def one(number: int) -> None:
            await journal.add(void(number))
            await asyncio.sleep(0)
            if number % 10:
                await journal.done(f"rsv_{number}")

        await asyncio.gather(*(one(number) for number in range(500)))
        assert journal.pending == 50
    async with opened(directory) as journal:
        assert set(ids(await journal.adopt())) == {f"rsv_{number}" for number in range(0, 500, 10)}


async def test_closing_waits_for_what_is_on_its_way(directory: Path) -> None:
    journal = Journal(directory)
    await journal.open()
    caller = asyncio.create_task(journal.add(void(1)))
    await asyncio.sleep(0)
    await journal.close()
    await caller
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1"]


async def test_a_new_file_that_another_process_adopts_before_it_is_locked_is_made_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    taken: list[Path] = []

    def late_lock(fd: int, how: int) -> None:
        if not taken:
            taken.extend(journal_files(directory))
            taken[0].unlink()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    async with opened(directory) as journal:
        await journal.add(void(1))
    async with opened(directory) as journal:
        assert ids(await journal.adopt()) == ["rsv_1"]
