"""When a run ends before its time: signals, a stop file, the longest runtime.

- The first SIGTERM or SIGINT lets the step finish, saves and ends; the second ends at once and harms no checkpoint.
- Ranks agree: a signal that reached one ends all at the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetuner.runtime import dist
from finetuner.runtime.log import say
from finetuner.runtime.ranks import is_main

STOP_FILE = "STOP"


class Halt:
    """Whether the run should end now, and with which exit code."""

    def __init__(self, folder: Path, max_runtime: float | None) -> None:
        self._file = folder / STOP_FILE
        self._until = None if max_runtime is None else time.monotonic() + max_runtime * 3600
        self._signal = 0
        self.exit_code: int | None = None
        """Set once the run should end: 143, 130, or 0 for a stop file or the runtime."""

    def __call__(self) -> bool:
        """Whether to end after this step; the same on all ranks, which end with one exit code."""
        late = self._until is not None and time.monotonic() > self._until
        wish = 128 + self._signal if self._signal else 1 if late or self._file.exists() else 0
        agreed = int(dist.largest(wish))
        if agreed:
            self.exit_code = 0 if agreed == 1 else agreed
            if is_main():
                self._file.unlink(missing_ok=True)
        return bool(agreed)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches SIGTERM and SIGINT inside."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = number
        say(f"{signal.Signals(number).name}: saving after this step; once more ends at once")
