"""What is wrong with a configuration, and where."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


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
    """The configuration cannot be used. problems: every mistake of every file, sorted by file and line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggestion(word: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for a near miss of a known word, else the list of what is known (at most ten)."""
    options = list(known)
    near = get_close_matches(word, options, n=1)
    if near:
        return f"did you mean {near[0]}?"
    more = ", …" if len(options) > 10 else ""
    return f"known here: {', '.join(options[:10])}{more}"
