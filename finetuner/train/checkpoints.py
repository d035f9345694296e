"""The checkpoints of a run: copied between two steps, written while the next ones are taken.

    step 500 -> wait for the write before, if it is not done -> copy what training changes -> step 501, 502, ...
                                                          \\-> commit checkpoint-500 -> last, best -> delete old ones

- One thread does all that touches the disk, in this order, for one checkpoint after the other: a checkpoint is there as
  a whole before a link points to it and before an older one is deleted, as if training had waited.
- What it cannot write ends the run at the next step, or at its end, with the error that a waiting run would end with.
- The main rank writes the weights and commits. Where ranks hold parts of the state, each has a thread that writes its
  own into the same folder, and the main rank's waits for them: see `joint.py`. Only the ranks' main threads talk, when
  they copy. Ranks meet at every step, so none runs ahead; only at the end they wait for the write: the first to leave
  may take the job's machines along.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from finetuner.config.run import Run
from finetuner.engine import checkpoint
from finetuner.engine.engine import Engine
from finetuner.engine.snapshot import Copies
from finetuner.engine.state import State, files, write_state
from finetuner.model.identity import RECORD
from finetuner.runtime import dist, joint
from finetuner.runtime.commit import unfinished
from finetuner.runtime.log import say
from finetuner.runtime.ranks import is_main, rank
from finetuner.train.writer import Writer


class Checkpoints:
    """A block of a run in which checkpoints are written; it ends when the last one is there."""

    def __init__(self, run: Run, folder: Path, engine: Engine, *, identity: str, base: str | None) -> None:
        self._run, self._folder, self._engine, self._identity, self._base = run, folder, engine, identity, base
        self._writer, self._copies = Writer(), Copies()
        self._has_told = False

    def save(self, number: int, standing: Mapping[str, Any], best: int | None) -> None:
        """Has `checkpoint-NUMBER` written as the model stands now; `best` is the step of the best one.

        Raises: what writing the one before raised; where the machine lacks the memory for a copy, this one.
        """
        self._writer.wait()
        state, values = self._engine.state(), self._engine.weights()
        share = agreed(bool(state.parts))
        if not is_main() and rank() not in share.holders:
            return
        in_background = self._run.save.background and self._have_room(state, values)
        if in_background:
            state, values = copied(self._copies, state, values)
        if is_main():
            save = self._engine.learner.saver(values)
            job = functools.partial(self._write, number, standing, best, state, save, self._about(), share)
        else:
            job = functools.partial(contribute, self._folder / f"checkpoint-{number}", state, share)
        if in_background:
            self._writer.begin(job)
        else:
            job()

    def check(self) -> None:
        """Raises what writing the last one raised, if that has ended."""
        self._writer.check()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.__exit__(kind, error, at)
        if error is None:
            dist.barrier()

    def _have_room(self, state: State, values: Mapping[str, Tensor]) -> bool:
        everything = named(state, values)
        fits = self._copies.fits(everything)
        if not fits and not self._has_told:
            needs = self._copies.needs(everything) / 1e9
            say(f"training waits while a checkpoint is written: for a copy of {needs:.1f} GB the memory is too short")
            self._has_told = True
        return fits

    def _write(
        self,
        number: int,
        standing: Mapping[str, Any],
        best: int | None,
        state: State,
        save: Callable[[Path], None],
        about: Mapping[str, Any],
        share: Share,
    ) -> None:
        """Commits the checkpoint, then lets the links follow, then deletes what is old."""

        def fill(folder: Path) -> None:
            others = [holder for holder in share.holders if holder != rank()]
            if others:
                (folder / "state").mkdir()
                joint.begin(folder, share.token)
            save(folder)
            if rank() in share.holders:
                write_state(folder / "state", state, *share.place)
            if others:
                joint.collect(folder, share.token, others)
            (folder / RECORD).write_text(json.dumps(about, indent=2), encoding="utf-8")

        path = checkpoint.write(self._folder, number, fill, {"run": self._identity, "standing": dict(standing)})
        checkpoint.link(self._folder, "last", path)
        best_path = self._folder / f"checkpoint-{best}" if best is not None else None
        if best_path is not None and best_path.is_dir():
            checkpoint.link(self._folder, "best", best_path)
        checkpoint.rotate(self._folder, self._identity, self._run.save.keep, best_path)

    def _about(self) -> dict[str, Any]:
        """What merging and chatting need to know beyond what peft and transformers write."""
        model = self._run.model
        template = self._engine.learner.tokenizer.chat_template or ""
        return {
            "base": model.path if isinstance(model.path, str) else None,
            "revision": model.revision,
            "base_identity": self._base,
            "quant": None if model.quant is None else "nf4",
            "dtype": model.dtype,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        }


@dataclass(frozen=True, slots=True)
class Share:
    """How the ranks share in writing one checkpoint."""

    holders: tuple[int, ...]
    """Ranks that hold a part of the state."""
    pid: int
    """Of the main rank's process, after which the unfinished folder is named."""
    token: str
    """Of this checkpoint alone."""

    @property
    def place(self) -> tuple[int, int]:
        """The how-manyth of how many holders this rank is."""
        return self.holders.index(rank()), len(self.holders)


def agreed(holds: bool) -> Share:
    """The share of all ranks in a checkpoint, of which this one `holds` a part or not. All ranks call it."""
    told = dist.gathered((holds, os.getpid(), secrets.token_hex(8)))
    holders = tuple(number for number, (is_holder, _, _) in enumerate(told) if is_holder)
    assert holders, "some rank holds the state"
    return Share(holders, told[0][1], told[0][2])


def contribute(final: Path, state: State, share: Share) -> None:
    """Writes what this rank, which is not the main one, holds into the folder that will be `final`."""
    own, count = share.place
    names = [f"state/{name}" for name in files(own, count)]
    fill = functools.partial(_fill, state=state, own=own, count=count)
    joint.contribute(unfinished(final, share.pid), share.token, rank(), names, fill)


def _fill(folder: Path, state: State, own: int, count: int) -> None:
    write_state(folder / "state", state, own, count)


def named(state: State, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that a checkpoint is written from, under one name each."""
    parts = {"moments": state.moments, "masters": state.masters, "values": values}
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def copied(copies: Copies, state: State, values: Mapping[str, Tensor]) -> tuple[State, dict[str, Tensor]]:
    """The same as they stand now, in memory that training does not touch."""
    taken = copies.take(named(state, values))
    moments = {name: taken[f"moments/{name}"] for name in state.moments}
    masters = {name: taken[f"masters/{name}"] for name in state.masters}
    return dataclasses.replace(state, moments=moments, masters=masters), {n: taken[f"values/{n}"] for n in values}
