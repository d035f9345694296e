"""`Feed`: the batches of each step for one rank, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetuner.data.batch import Batch
from finetuner.data.collate import collate
from finetuner.data.packs import Packs
from finetuner.data.samples import Samples
from finetuner.data.steps import Plan


@dataclass(frozen=True, slots=True)
class Feed:
    """What the loop of rank `rank` of `world` is fed."""

    samples: Samples
    plan: Plan
    rank: int
    world: int
    per_device: int

    @property
    def steps(self) -> int:
        return self.plan.steps

    def learned(self, step: int) -> int:
        """Places with a target in the whole step, over all ranks."""
        return self.plan.learned(step)

    def lengths(self, step: int) -> npt.NDArray[np.int64]:
        """Tokens of each document of the whole step, over all ranks."""
        packs = self.plan.packs
        slices = [np.arange(packs.bounds[row], packs.bounds[row + 1]) for row in self.plan.rows(step)]
        chosen = np.concatenate(slices)
        lengths: npt.NDArray[np.int64] = packs.stops[chosen] - packs.starts[chosen]
        return lengths

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step."""
        shares = self.plan.micro_batches(step, self.rank, self.world, self.per_device)
        return [collate(self.samples, self.plan.packs, share) for share in shares]


def validation_batches(samples: Samples, packs: Packs, rank: int, world: int) -> Sequence[Batch]:
    """A rank's part of a validation set, one pack a batch; no pack stands in two parts.

    As many batches on every rank, some perhaps with nothing to learn: ranks that share a model go through it together.
    """
    numbers = range(len(packs))
    shared = [numbers[first : first + world] for first in range(0, len(packs), world)]
    return [collate(samples, packs, few[rank : rank + 1]) for few in shared]
