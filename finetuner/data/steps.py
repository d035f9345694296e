"""`Plan`: which packs each optimizer step takes, as a pure function of the step; resuming needs one integer.

- Each epoch takes every pack once, in an order of its own, and ends with a short step if `total` does not divide it:
  no step takes packs of two epochs.
- The order knows nothing of ranks: the packs of a step are the same on any number of them.
- Every rank gets the same number of micro-batches, of about the same work; where packs run out, an empty one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from finetuner.config.run import BatchSize, Epochs, Steps
from finetuner.data.deal import cost, deal
from finetuner.data.order import permutation
from finetuner.data.packs import Packs
from finetuner.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run. Steps count from 0."""

    packs: Packs
    total: int
    """Packs of one step, over all ranks."""
    until: Steps | Epochs
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.packs) // self.total)

    @property
    def steps(self) -> int:
        match self.until:
            case Steps():
                return self.until.count
            case Epochs():
                # As written in the config: 0.07 epochs of 100 steps are 7, not the 8 that binary fractions round up to.
                return math.ceil(Fraction(str(self.until.count)) * self.steps_per_epoch)
            case _:
                assert_never(self.until)

    def epoch(self, step: int) -> int:
        """How many passes were completed before the step."""
        return step // self.steps_per_epoch

    def rows(self, step: int) -> tuple[int, ...]:
        """Numbers of the packs that the step takes."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.packs))
        return tuple(order[index * self.total : (index + 1) * self.total].tolist())

    def micro_batches(self, step: int, rank: int, world: int, per_device: int) -> list[tuple[int, ...]]:
        """The step's packs that a rank takes, one micro-batch after another.

        One rank takes them as they come; several so that each has as much to do: see `deal`.
        """
        rows = self.rows(step)
        if world == 1:
            return [rows[start : start + per_device] for start in range(0, len(rows), per_device)]
        dealt = deal([cost(self.packs.lengths(row)) for row in rows], world, per_device)
        return [tuple(rows[place] for place in cell) for cell in dealt[rank]]

    def learned(self, step: int) -> int:
        """Learned places of the whole step, over all ranks."""
        return int(self.packs.learned[list(self.rows(step))].sum())


def accumulation(batch: BatchSize, world: int) -> int:
    """Micro-batches of a step on each rank.

    Raises:
        ConfigError: E-BATCH-DIVIDE, the total is no multiple of what all ranks take at once.
    """
    together = batch.per_device * world
    if batch.total % together:
        below = batch.total // together * together
        fits = ", ".join(str(total) for total in (below, below + together) if total)
        each = f"total={batch.total}, per_device={batch.per_device}, {world} rank" + ("s" if world > 1 else "")
        raise ConfigError(
            Problem(
                "E-BATCH-DIVIDE",
                "the batch does not divide",
                where="batch.total",
                found=each,
                fits=f"a multiple of {together}: {fits}",
                remedy=f"batch.total={below or together}",
            )
        )
    return batch.total // together
