"""The checkpoints of a run's folder: written, found again, rotated; `last` and `best` point to two of them.

    write(folder, 500, fill, {"run": id}) -> link(folder, "last", ...) -> rotate(folder, run, keep)

in this order: nothing is deleted before the new one is there as a whole.

- Numbers are compared as numbers. What bears another name, or another run's id in its manifest, is left alone.
- The links are for people; no one who resumes trusts them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuner.errors import CheckpointError, Problem
from finetuner.runtime.commit import commit_dir, read_manifest, remove_dir, verify
from finetuner.runtime.fault import fault

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A folder named like a checkpoint that is not gone on from, and why."""

    folder: Path
    kind: Literal["torn", "foreign"]
    reason: str

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.reason}"


def write(folder: Path, step: int, fill: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
    """Writes `checkpoint-STEP` by `fill`, all or nothing; `meta["run"]` is the id of the run that owns it.

    Raises:
        CheckpointError: the disk is full, or the name is taken by another run.
    """
    final = folder / f"checkpoint-{step}"
    owner = _owner(final)
    if owner not in (None, meta["run"]):
        raise CheckpointError(
            Problem(
                "E-CHECKPOINT-FOREIGN",
                "a checkpoint of another run has this name",
                where=str(final),
                found=f"run {owner}",
                fits=f"run {meta['run']}",
                remedy="move it away, or give another folder",
            )
        )
    with commit_dir(final, meta={**meta, "step": step}) as temporary:
        fill(temporary)
    return final


def step_of(checkpoint: Path) -> int:
    """The step in the name: checkpoint-500 -> 500."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose manifest verifies, newest first, whoever wrote them."""
    return [path for path in _named(folder) if verify(path) is None]


def latest(folder: Path, run: str) -> tuple[Path | None, list[Skipped]]:
    """The newest complete checkpoint of `run`, and the newer ones that were passed over."""
    skipped = []
    for path in _named(folder):
        reason = verify(path, contents=False)
        owner = _owner(path)
        if owner not in (None, run):
            skipped.append(Skipped(path, "foreign", f"written by another run ({owner})"))
        elif reason := reason or verify(path):
            skipped.append(Skipped(path, "torn", reason))
        elif owner is None:
            skipped.append(Skipped(path, "foreign", "does not say which run wrote it"))
        else:
            return path, skipped
    return None, skipped


def rotate(folder: Path, run: str, keep: int, best: Path | None = None) -> list[Path]:
    """Deletes what is older than the newest `keep` checkpoints of `run`, never `best`; says what it deleted."""
    assert keep >= 1, keep
    own = [path for path in _named(folder) if _owner(path) == run and verify(path, contents=False) is None]
    doomed = [path for path in own[keep:] if best is None or path.name != best.name]
    for path in reversed(doomed):
        remove_dir(path)
    return doomed


def link(folder: Path, name: Literal["last", "best"], checkpoint: Path) -> None:
    """Lets `folder`/`name` point to a checkpoint in `folder`, from one moment to the next.

    Raises:
        CheckpointError: something that is no link stands there.
    """
    check_place(folder, name)
    target = folder / name
    temporary = folder / f".tmp_{name}_{os.getpid()}"
    temporary.unlink(missing_ok=True)
    fault("link")
    temporary.symlink_to(checkpoint.name)
    fault("rename")
    os.replace(temporary, target)


def check_place(folder: Path, name: Literal["last", "best"]) -> None:
    """Refuses a folder in which `name` is no link of ours.

    Raises:
        CheckpointError: something that is no link stands there.
    """
    target = folder / name
    if os.path.lexists(target) and not target.is_symlink():
        raise CheckpointError(
            Problem(
                "E-CHECKPOINT-LINK",
                f"{name!r} is not a link",
                where=str(target),
                found="a file or a folder",
                fits="a link to a checkpoint",
                remedy=f"move {target} away",
            )
        )


def linked(folder: Path, name: Literal["last", "best"]) -> Path | None:
    """The checkpoint that `folder`/`name` points to, if it is there."""
    target = folder / name
    if not target.is_symlink():
        return None
    checkpoint = folder / os.readlink(target)
    is_ours = checkpoint.parent == folder and NAME.fullmatch(checkpoint.name) is not None
    return checkpoint if is_ours and checkpoint.is_dir() else None


def _named(folder: Path) -> list[Path]:
    """Folders named like checkpoints, newest first; links are not folders."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def _owner(checkpoint: Path) -> str | None:
    """The id of the run that wrote it, or None if its manifest does not say."""
    try:
        owner = read_manifest(checkpoint)["meta"].get("run")
    except CheckpointError:
        return None
    return owner if isinstance(owner, str) else None
