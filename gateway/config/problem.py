"""What is wrong with a configuration, and where."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake. line and column count from 1. The message never holds a secret."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class ConfigError(Exception):
    """The configuration cannot be used. problems: every mistake of every file, sorted by file and line.

    files: the files that were read or should have been, each with the SHA-256 of its content, empty if unreadable.
    """

    def __init__(self, problems: Iterable[Problem], files: Mapping[Path, str] = MappingProxyType({})) -> None:
        self.problems = tuple(sorted(set(problems)))
        self.files = files
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggestion(word: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for a near miss of a known word, else the list of what is known (at most ten)."""
    options = list(known)
    near = get_close_matches(word, options, n=1)
    if near:
        return f"did you mean {near[0]}?"
    more = ", …" if len(options) > 10 else ""
    return f"known here: {', '.join(options[:10])}{more}"
