"""What a person sees while a run goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetuner.runtime.log import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """Shows the step, the newest figures and the time that is left."""

    def __init__(self, start: int, steps: int) -> None:
        self._start, self._steps = start, steps
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if is_terminal():
            self._bar, self._task = bar(start, steps)

    def move(self, number: int) -> None:
        """Moves on to step `number`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows the figures of a logged step."""
        text = "  ".join(f"{name} {figure(name, record[name])}" for name in SHOWN if name in record)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record["step"], text=text)
            if "eval_loss" in record:
                self._bar.console.print(f"step {record['step']}  {text}", highlight=False)
        else:
            say(f"step {record['step']}/{self._steps}  {text}{self._left(record['step'])}")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, number: int) -> str:
        if number <= self._start or number >= self._steps:
            return ""
        seconds = int((time.monotonic() - self._began) / (number - self._start) * (self._steps - number))
        return f"  left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Counting:
    """Shows how many rows are encoded: one bar on a terminal, a line now and then elsewhere."""

    EVERY = 10_240

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int | None) -> None:
        if self._bar is None and is_terminal():
            self._bar, self._task = rows_bar()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done % self.EVERY == 0:
            say(f"encoded {done:,} rows" + (f" of {total:,}" if total else ""))

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def is_terminal() -> bool:
    """Whether a bar can be drawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


SHOWN = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_gib", "data_wait")


def figure(name: str, value: float) -> str:
    """`value` as a person reads it: ("learning_rate", 0.0002) -> "2.00e-04"."""
    match name:
        case "learning_rate":
            return f"{value:.2e}"
        case "tokens_per_second":
            return f"{value:,.0f}"
        case "mfu" | "data_wait":
            return f"{value:.1%}"
        case "memory_gib":
            return f"{value:.2f}"
        case _:
            return f"{value:.4f}"


def bar(start: int, steps: int) -> tuple[Bar, TaskID]:
    """A running bar of rich's."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    made = Bar(*columns, console=Console(stderr=True))
    task = made.add_task("train", total=steps, completed=start, text="")
    made.start()
    return made, task


def rows_bar() -> tuple[Bar, TaskID]:
    """A running bar that counts rows; how many there are is not known beforehand."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("encoding"), BarColumn(bar_width=24), TextColumn("{task.completed:,.0f} rows"))
    made = Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    task = made.add_task("encode", total=None)
    made.start()
    return made, task
