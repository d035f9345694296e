"""What is logged of a run: metrics.jsonl, the terminal, trackers.

- metrics.jsonl holds one line a logged step; on resume the lines past the checkpoint are cut: none stands twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetuner.config.run import Run
from finetuner.runtime.ranks import is_main
from finetuner.train.loop import Step
from finetuner.train.progress import Progress
from finetuner.train.use import Use

Tracker = Callable[[int, Mapping[str, float]], None]


class Metrics:
    """A listener that writes each `log.every`-th step, the first and the last, and whatever else is measured."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        start: int,
        steps: int,
        steps_per_epoch: int,
        use: Use,
        trackers: tuple[Tracker, ...] = (),
    ) -> None:
        self._every = run.log.every.count
        self._rate = run.optim.lr
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._use, self._trackers = use, trackers
        self._file = folder / "metrics.jsonl"
        self._progress = Progress(start, steps) if is_main() else None
        if is_main():
            keep_lines(self._file, start)
        use.begin()

    def __call__(self, step: Step) -> bool:
        self._use.add(step)
        if step.number % self._every and step.number not in (1, self._steps):
            if self._progress:
                self._progress.move(step.number)
            return False
        figures = step.read()
        record = {
            "step": step.number,
            "epoch": round(step.number / self._steps_per_epoch, 4),
            "loss": figures.loss,
            "grad_norm": figures.norm,
            "learning_rate": self._rate * step.factor,
            "tokens": step.tokens,
            "learned_tokens": step.learned,
        }
        self.note(record | self._use.since_last())
        return False

    def note(self, record: Mapping[str, Any]) -> None:
        """Writes one line, shows it, and sends its numbers to the trackers."""
        if not is_main():
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._progress:
            self._progress.show(record)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        for track in self._trackers:
            track(record["step"], numbers)

    def pause(self) -> None:
        """Leaves the time that now passes (an evaluation, a save) out of the tokens per second."""
        self._use.pause()

    def go_on(self) -> None:
        """Ends a pause."""
        self._use.go_on()

    def close(self) -> None:
        """Ends the progress bar."""
        if self._progress:
            self._progress.close()


def keep_lines(file: Path, step: int) -> None:
    """Cuts the lines of `file` that tell of steps after `step`, and a torn last line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    fresh = file.with_suffix(".jsonl.new")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, file)
