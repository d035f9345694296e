"""What the tests of bad input share: a case, a small world to spoil, and what every error must look like."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import world

from finetuner.cli.main import main

MOST_LINES = 40
"""Of a message: one screen."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is made wrong in a world, and what must be told of it."""

    name: str
    wrong: Callable[[Path], object]
    """Spoils the world in this folder, which is the current one."""
    code: str = ""
    """E-...; empty: it works."""
    words: tuple[str, ...] = ()
    """What the message holds: the place, what was found, the remedy."""
    args: tuple[str, ...] = ()
    """Behind `train config.py`; or, where the first is a verb, the whole command."""

    def __str__(self) -> str:
        return self.name

    @property
    def command(self) -> list[str]:
        own = self.args and self.args[0] in VERBS
        return list(self.args) if own else ["train", "config.py", *self.args]


VERBS = ("train", "show", "preview", "list", "copy", "chat", "merge", "env")


def nothing(folder: Path) -> None:
    """Leaves the world as it is: the command is what is wrong."""


def edit(old: str, new: str, file: str = "config.py") -> Callable[[Path], None]:
    """Replaces `old` once in a file of the world; where it is not there, the test is wrong."""

    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text, f"{old!r} is not in {file}"
        (folder / file).write_text(text.replace(old, new, 1))

    return change


def write(**files: str | bytes) -> Callable[[Path], None]:
    """Writes files; a name's last "_" stands for its dot: rows_jsonl."""

    def put(folder: Path) -> None:
        for name, content in files.items():
            path = folder / ".".join(name.rsplit("_", 1))
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    """All of these changes, in order."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def base(folder: Path, **options: object) -> Path:
    """The sound world that cases copy and spoil: full training of one step."""
    world.make(folder, **{"model": "", "until": "Steps(1)", "every": 1, "count": 5, **options})
    return folder


def copy(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True, symlinks=True)
    return folder


def run(command: list[str], capsys) -> tuple[int, str]:
    """(exit code, standard error) of a command line, in this process."""
    capsys.readouterr()
    code = main(command)
    return code, capsys.readouterr().err


def wrong_with(case: Case, code: int, err: str, *, exit_code: int) -> list[str]:
    """What is not as it should be in how a case was told; empty: nothing."""
    faults = []
    if "Traceback" in err or "unexpected error" in err:
        faults.append("a bug is shown instead of a message")
    if not case.code:
        return faults + ([f"exit code {code} of what works"] if code else [])
    if code != exit_code:
        faults.append(f"exit code {code}, not {exit_code}")
    if err.count(f"error[{case.code}]") != 1:
        faults.append(f"{case.code} is told {err.count(f'error[{case.code}]')} times")
    if not re.search(r"(where|found):" if case.code != "E-USAGE" else "fits:", err) or "remedy:" not in err:
        faults.append("no place or no remedy")
    if len(err.splitlines()) >= MOST_LINES:
        faults.append(f"{len(err.splitlines())} lines")
    return faults + [f"does not say {word!r}" for word in case.words if word not in err]


def check(case: Case, code: int, err: str, *, exit_code: int = 0) -> None:
    """Fails, with the message, unless the case is told as it must be."""
    faults = wrong_with(case, code, err, exit_code=exit_code)
    assert not faults, f"{case.name}: {'; '.join(faults)}\n{err}"
