"""Keeps a running gateway's configuration up to date with its files.

A configuration with a mistake changes nothing: the one before it stays in force until the mistake is mended.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from gateway.config.changes import Changes, changes, taken_over
from gateway.config.document import MAX_FILE_BYTES, UNREADABLE, digest
from gateway.config.model import GatewayConfig
from gateway.config.problem import ConfigError

log = logging.getLogger(__name__)

POLL_S = 2.0
#: A file that has just changed may be half written, or one of several that change together.
REST_S = 0.25
_MOST_RESTS = 20
#: The longest list of changes in one line of the log.
_MOST_NAMED = 20

#: What tells without reading that a file is the one that was read.
_Look = tuple[int, ...] | None


class WatchedFiles:
    """Files, each with the digest of the content that was read; says when there is another content to read.

    Symbolic links are followed at every look: swapping one is a change, and so is a file that comes or goes.
    """

    def __init__(self, read: Mapping[Path, str]) -> None:
        self._digests = dict(read)
        self._looks: dict[Path, _Look] = {}

    def changed(self) -> bool:
        """Whether a file's content is another than the one that was read. Reads only files that look different."""
        return any(self._differs(file) for file in self._digests)

    def _differs(self, file: Path) -> bool:
        look = _look_of(file)
        if file in self._looks and look == self._looks[file]:
            return False
        if _digest_of(file) != self._digests[file]:
            return True
        self._looks[file] = look
        return False

    def content(self) -> Mapping[Path, str]:
        """The digests as of now."""
        return {file: _digest_of(file) for file in self._digests}


def _look_of(file: Path) -> _Look:
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest_of(file: Path) -> str:
    try:
        with file.open("rb") as open_file:
            content = open_file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError):
        return UNREADABLE
    # As the loader has it, which does not look into one that is too large.
    return UNREADABLE if len(content) > MAX_FILE_BYTES else digest(content)


class LiveConfig:
    """The configuration in force, and how another takes its place.

    read: reads the files again, in a thread; raises ConfigError. apply: makes the gateway work by a configuration
    from now on; requests in flight keep theirs. reloaded: is told after every reading whether it was taken over.
    """

    def __init__(
        self,
        config: GatewayConfig,
        read: Callable[[], GatewayConfig],
        apply: Callable[[GatewayConfig], Awaitable[None]],
        reloaded: Callable[[bool], None],
    ) -> None:
        self.config = config
        self._read = read
        self._apply = apply
        self._reloaded = reloaded
        self._files = WatchedFiles(config.files)
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> Changes:
        """Read the files and take over what they say now; what that changes.

        Raises ConfigError when they have mistakes: then all stays as it is, and every mistake is in the log.
        """
        async with self._one_at_a_time:
            try:
                found = await self._take_over()
            except ConfigError as error:
                self._files = WatchedFiles(error.files)
                for problem in error.problems:
                    log.error("configuration not reloaded: %s", problem)
                self._reloaded(False)
                raise
            except Exception as error:
                log.error("configuration not reloaded", exc_info=error)
                self._reloaded(False)
                raise
            self._reloaded(True)
            return found

    async def _take_over(self) -> Changes:
        read = await asyncio.to_thread(self._read)
        found = changes(self.config, read)
        config = taken_over(self.config, read)
        await self._apply(config)
        self.config = config
        self._files = WatchedFiles(read.files)
        _tell(found)
        return found

    async def follow(self) -> None:
        """Reload whenever a file has changed and then rested for a moment, for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            if not await asyncio.to_thread(self._files.changed):
                continue
            await self._wait_for_rest()
            with suppress(Exception):  # the log has it; what was in force still is
                await self.reload()

    async def _wait_for_rest(self) -> None:
        seen = await asyncio.to_thread(self._files.content)
        for _ in range(_MOST_RESTS):
            await asyncio.sleep(REST_S)
            now = await asyncio.to_thread(self._files.content)
            if now == seen:
                return
            seen = now


def _tell(found: Changes) -> None:
    if found.applied:
        more = f" and {len(found.applied) - _MOST_NAMED} more" if len(found.applied) > _MOST_NAMED else ""
        log.info("configuration reloaded: %s%s", ", ".join(found.applied[:_MOST_NAMED]), more)
    else:
        log.info("configuration reloaded: nothing that counts has changed")
    if found.removed_plans:
        log.warning(
            "plans removed: %s; accounts on them are refused until set-plan moves them", ", ".join(found.removed_plans)
        )
    if found.needs_restart:
        log.warning("changed but not applied before a restart: %s", ", ".join(found.needs_restart))
