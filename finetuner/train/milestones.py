"""What happens at some steps of a run: validation, checkpoints, answers, the early end.

Validate -> is it the best yet, is it time to stop -> save (see `checkpoints.py`) -> ask. A best step is always saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetuner.config.run import Run, Steps
from finetuner.runtime.log import say
from finetuner.runtime.watchdog import phase
from finetuner.train.checkpoints import Checkpoints
from finetuner.train.loop import Step
from finetuner.train.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Standing:
    """What a checkpoint remembers of the run besides weights and optimizer."""

    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    """Evaluations since the best one."""
    finished: bool = False

    def after(self, step: int, loss: float) -> Standing:
        """The standing after an evaluation; a loss that is not a number is never the best."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return Standing(loss, step)
        return dataclasses.replace(self, waited=self.waited + 1)


class Milestones:
    """A listener for all that does not happen at every step."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        metrics: Metrics,
        *,
        steps: int,
        standing: Standing,
        halt: Callable[[], bool],
        validate: Callable[[], float] | None,
        ask: Callable[[int], None] | None,
    ) -> None:
        self._run, self._checkpoints, self._metrics, self._steps, self._halt = run, checkpoints, metrics, steps, halt
        self._validate, self._ask = validate, ask
        self.standing = standing

    def __call__(self, step: Step) -> bool:
        self._checkpoints.check()
        number, last, halt = step.number, step.number == self._steps, self._halt()
        saving = last or halt or due(self._run.save.every, number)
        validating = self._validate is not None and not halt and self._is_validating(number, saving)
        best = early = False
        if saving or validating:
            step.read()  # nothing is judged or kept of a step that was not finite
        self._metrics.pause()
        if validating:
            with phase("validation"):
                best, early = self._judge(number)
        if saving or best or early:
            self.standing = dataclasses.replace(self.standing, finished=last or early)
            with phase("saving"):
                self._checkpoints.save(number, dataclasses.asdict(self.standing), self.standing.best_step)
        if self._ask is not None and not halt and self._is_asking(number, saving or early):
            with phase("answers"):
                self._ask(number)
        self._metrics.go_on()
        return halt or early

    def _is_validating(self, number: int, saving: bool) -> bool:
        every = self._run.eval.every if self._run.eval else None
        return saving if every is None else due(every, number) or number == self._steps

    def _is_asking(self, number: int, saving: bool) -> bool:
        every = self._run.ask.every if self._run.ask else None
        return saving if every is None else due(every, number) or number == self._steps

    def _judge(self, number: int) -> tuple[bool, bool]:
        """Measures the validation loss; whether it is the best, and whether the run ends early."""
        assert self._validate is not None
        loss = self._validate()
        self.standing = self.standing.after(number, loss)
        self._metrics.note({"step": number, "eval_loss": loss, "best_step": self.standing.best_step})
        patience = self._run.eval.patience if self._run.eval else None
        early = patience is not None and self.standing.waited >= patience
        if early:
            say(f"no better validation loss for {self.standing.waited} evaluations: the run ends at step {number}")
        return self.standing.best_step == number, early


def due(every: Steps | None, number: int) -> bool:
    """Whether something that happens every so many steps happens at step `number`."""
    return every is not None and number % every.count == 0


def standing_of(meta: Mapping[str, Any]) -> Standing:
    """The standing that a checkpoint's manifest holds."""
    return Standing(**meta["standing"])
