"""The loop: from batches to optimizer steps, each told to the listeners.

The learned tokens of a step are counted first, over all its batches and ranks, and the summed loss is divided by them:
a step is the same however it is cut into micro-batches, packs and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from finetuner.config.run import Schedule
from finetuner.data.batch import Batch
from finetuner.engine.engine import Engine, NonFinite
from finetuner.engine.schedule import factor
from finetuner.errors import Problem, TrainingStopped
from finetuner.runtime import dist
from finetuner.runtime.ranks import rank
from finetuner.runtime.seed import seed_all


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step came to. `number` counts from 1: the steps done."""

    number: int
    loss: float
    """Mean over the step's learned tokens, all ranks."""
    norm: float
    """Of the gradient, before clipping."""
    factor: float
    """What every rate was multiplied with."""
    learned: int
    tokens: int
    """Of all ranks, learned or not."""


class Feed(Protocol):
    """Where batches come from: pure functions of the step (`data.feed.Feed`)."""

    @property
    def steps(self) -> int: ...
    def learned(self, step: int) -> int: ...
    def tokens(self, step: int) -> int: ...
    def batches(self, step: int) -> Sequence[Batch]: ...


class Listener(Protocol):
    """Hears of each step, after the update; a true answer ends the run there."""

    def __call__(self, step: Step) -> bool: ...


def train(
    engine: Engine,
    feed: Feed,
    schedule: Schedule,
    listeners: Iterable[Listener],
    *,
    start: int,
    seed: int,
    broken: Callable[[int, Sequence[Batch], float, str], Problem],
) -> None:
    """Performs the steps from `start` until the feed ends or a listener says so.

    `broken` writes down the batches of a step whose loss or gradient is not finite and words the problem.

    Raises:
        TrainingStopped: a loss or gradient that is not finite; the weights are those of the step before.
    """
    listeners = tuple(listeners)
    for step in range(start, feed.steps):
        batches, learned = feed.batches(step), feed.learned(step)
        loss = torch.zeros(1, dtype=torch.float64)
        for index, batch in enumerate(batches):
            seed_all(seed, step, index, rank())
            loss += engine.accumulate(batch, learned, last=index == len(batches) - 1).cpu()
        mean = float(dist.total(loss)) / learned
        if not math.isfinite(mean):
            raise TrainingStopped(broken(step, batches, mean, "the loss"))
        part = factor(schedule, step, feed.steps)
        try:
            norm = engine.step(part)
        except NonFinite as error:
            raise TrainingStopped(broken(step, batches, error.norm, f"the gradient of {error.where}")) from None
        done = Step(step + 1, mean, norm, part, learned, feed.tokens(step))
        # Each listener hears of each step, also after another has ended the run: a stop is saved before it ends.
        answers = [listener(done) for listener in listeners]
        if any(answers):
            return
