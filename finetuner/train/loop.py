"""The loop: from batches to optimizer steps, each told to the listeners.

The learned tokens of a step are counted first, over all its batches and ranks, and the summed loss is divided by them:
a step is the same however it is cut into micro-batches, packs and ranks.

The host does not wait for the device: a step's loss and norm stay there until a listener reads them. A step that is not
finite changes no weight all the same, nor does any after it, until the host learns of it: see `engine/watch.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetuner.config.run import Schedule
from finetuner.data.batch import Batch
from finetuner.engine.engine import Engine, NonFinite
from finetuner.engine.schedule import factor
from finetuner.errors import Problem, TrainingStopped
from finetuner.runtime import dist
from finetuner.runtime.ranks import rank
from finetuner.runtime.seed import seed_all

Broken = Callable[[int, Sequence[Batch], float, str], Problem]
"""Writes down the batches of a step whose loss or gradient is not finite, and words the problem."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one optimizer step came to."""

    loss: float
    """Mean over the step's learned tokens, all ranks."""
    norm: float
    """Of the gradient, before clipping."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step that is done, or under way on the device. `number` counts from 1: the steps done."""

    number: int
    factor: float
    """What every rate was multiplied with."""
    learned: int
    """Places with a target, of all ranks."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, of all ranks."""
    waited: float
    """Seconds that this rank waited for its batches."""
    read: Callable[[], Figures]
    """Waits for the device. Raises NonFinite, which is the loop's to explain, for this step or one before it."""

    @property
    def tokens(self) -> int:
        """Of all ranks, learned or not."""
        return int(self.lengths.sum())


class Feed(Protocol):
    """Where batches come from: pure functions of the step (`data.feed.Feed`)."""

    @property
    def steps(self) -> int: ...
    def learned(self, step: int) -> int: ...
    def lengths(self, step: int) -> npt.NDArray[np.int64]: ...
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
    broken: Broken,
) -> None:
    """Performs the steps from `start` until the feed ends or a listener says so.

    Raises:
        TrainingStopped: a loss or gradient that is not finite; the weights are those of the step before.
    """
    listeners = tuple(listeners)
    try:
        for step in range(start, feed.steps):
            begin = time.perf_counter()
            batches, learned = feed.batches(step), feed.learned(step)
            waited = time.perf_counter() - begin
            loss = dist.total(gathered(engine, batches, learned, seed, step)) / learned
            part = factor(schedule, step, feed.steps)
            norm = engine.step(step, part, loss)
            done = Step(step + 1, part, learned, feed.lengths(step), waited, reading(engine, loss, norm))
            # Each listener hears of each step, also after another has ended the run: a stop is saved before it ends.
            answers = [listener(done) for listener in listeners]
            if any(answers):
                return
    except NonFinite as error:
        raise TrainingStopped(explained(error, engine, feed, seed, broken)) from None


def gathered(engine: Engine, batches: Sequence[Batch], learned: int, seed: int, step: int) -> Tensor:
    """The gradient of a step, gathered batch by batch; gives this rank's summed loss, a float64 scalar."""
    losses = []
    for index, batch in enumerate(batches):
        seed_all(seed, step, index, rank())
        losses.append(engine.accumulate(batch, learned, last=index == len(batches) - 1).double())
    return torch.stack(losses).sum()


def reading(engine: Engine, loss: Tensor, norm: Tensor) -> Callable[[], Figures]:
    """What reads a step's figures."""

    def read() -> Figures:
        engine.settle()
        return Figures(float(loss), float(norm))

    return read


def explained(error: NonFinite, engine: Engine, feed: Feed, seed: int, broken: Broken) -> Problem:
    """What was wrong with the step; where its loss was finite, it is gone through again to name the parameters."""
    batches = feed.batches(error.step)
    if not math.isfinite(error.loss):
        return broken(error.step, batches, error.loss, "the loss")
    gathered(engine, batches, feed.learned(error.step), seed, error.step)
    return broken(error.step, batches, error.norm, f"the gradient of {engine.suspects()}")
