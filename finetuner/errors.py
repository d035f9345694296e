"""What is told to a person when something is wrong: where, what was found, what would fit, one remedy.

- A `Problem` is one finding; a `FinetunerError` carries one or several and knows the exit code of its kind.
- Codes are stable: tests, scripts and search engines rely on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: `code` is stable (E-CONFIG-UNKNOWN), the rest is for the eye; empty parts are left out."""

    code: str
    what: str
    where: str = ""
    found: str = ""
    fits: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"error[{self.code}] {shortened(printable(self.what))}"]
        parts = (("where", self.where), ("found", self.found), ("fits", self.fits), ("remedy", self.remedy))
        lines += [f"  {name + ':':<8}{shortened(printable(text))}" for name, text in parts if text]
        return "\n".join(lines)


class FinetunerError(Exception):
    """Something that a person can mend; never shown with a traceback unless `--debug`."""

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error tells at least one problem"
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[FinetunerError], tuple[Problem, ...]]:
        return type(self), self.problems


class UsageError(FinetunerError):
    """The command line asks for something that is not there."""

    exit_code = 2


class ConfigError(FinetunerError):
    """A config file, an override or a pair of values is wrong."""

    exit_code = 2


class DataError(FinetunerError):
    """A data file or a row cannot be trained on."""

    exit_code = 3


class ModelError(FinetunerError):
    """A model, tokenizer or template cannot be used."""

    exit_code = 4


class CheckpointError(FinetunerError):
    """A checkpoint is missing, torn or of another run."""

    exit_code = 4


class TrainingStopped(FinetunerError):
    """Training stopped itself before doing harm."""

    exit_code = 5


def printable(text: str) -> str:
    """`text` with control characters written as escapes, so that no row of data can drive a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def shortened(text: str) -> str:
    """`text` cut to 20 lines of 500 characters, so that a message stays on one screen."""
    lines = [line if len(line) <= 500 else line[:497] + "..." for line in text.split("\n")]
    return "\n".join(lines if len(lines) <= 20 else [*lines[:19], "..."])


def nearest(name: str, names: Iterable[str]) -> str:
    """The best did-you-mean for `name` among `names`, or the empty string: ("ranc", ...) -> "rank"."""
    from difflib import get_close_matches

    known = {known.casefold(): known for known in names}
    return next((known[close] for close in get_close_matches(name.casefold(), known, n=1, cutoff=0.6)), "")
