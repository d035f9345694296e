"""Where a run goes on from: the newest complete checkpoint of its folder, or the one that was named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finetuner.engine import checkpoint
from finetuner.errors import CheckpointError, Problem
from finetuner.runtime.commit import read_manifest, verify
from finetuner.runtime.log import say, warn
from finetuner.train.milestones import Standing, standing_of
from finetuner.train.record import holds_run, run_id


@dataclass(frozen=True, slots=True)
class Resume:
    """A checkpoint to go on from, the step that it stands at, and how the run stood."""

    path: Path
    step: int
    standing: Standing


def find(folder: Path, resume: str) -> Resume | None:
    """What `--resume` means for `folder`: "auto" is its newest complete checkpoint, else a checkpoint's path.

    Raises:
        CheckpointError: the named checkpoint is not complete, or the folder holds checkpoints and none is complete.
    """
    if resume != "auto":
        return named(Path(resume), folder)
    identity = run_id(folder)
    if identity is None:
        return None
    path_or_none, skipped = checkpoint.latest(folder, identity)
    for folder_skipped in skipped:
        warn(f"not going on from {folder_skipped}")
    torn = [skip for skip in skipped if skip.kind == "torn"]
    if path_or_none is None and torn:
        raise CheckpointError(
            Problem(
                "E-CHECKPOINT-NONE",
                "no checkpoint of this run is complete",
                str(folder),
                "; ".join(map(str, torn)),
                remedy="--resume never starts anew and keeps this folder beside",
            )
        )
    return _at(path_or_none) if path_or_none else None


def named(path: Path, folder: Path) -> Resume:
    """The checkpoint at `path`, which is one of the run in `folder`.

    Raises:
        CheckpointError: it is not complete, or another run's, whose data and config it would not go on with.
    """
    broken = verify(path) if path.exists() else "nothing"
    if broken:
        inside = checkpoint.complete(path)
        remedy = f"--resume {inside[0]}" if inside else "--resume auto takes the newest complete one"
        what, fits = "the checkpoint to go on from is not complete", "a complete checkpoint folder"
        raise CheckpointError(Problem("E-CHECKPOINT-TORN", what, str(path), broken, fits, remedy))
    owner, identity = read_manifest(path)["meta"].get("run"), run_id(folder)
    if owner != identity:
        what = "the checkpoint to go on from is not one of this folder's run"
        home, fits = path.resolve().parent, f"a checkpoint of run {identity}" if identity else "the folder of its run"
        remedy = f"--folder {home}" if holds_run(home) else "train from its weights: give it as CausalLM's path"
        raise CheckpointError(
            Problem("E-CHECKPOINT-FOREIGN", what, str(path), f"run {owner}; the folder is {folder}", fits, remedy)
        )
    return _at(path)


def set_aside(folder: Path) -> None:
    """Moves a folder that holds a run to the first free NAME.1, NAME.2, ... so that a new one can begin."""
    if not holds_run(folder):
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, old)
    say(f"the old run is kept in {old}")


def _at(path: Path) -> Resume:
    meta = read_manifest(path)["meta"]
    return Resume(path, int(meta["step"]), standing_of(meta))
