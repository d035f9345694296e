"""What performs an optimizer step, whatever machinery is below.

The gradients of a step are the SUM over its batches and ranks of each batch's summed loss, divided by the learned
tokens of the whole step: how a step is cut into micro-batches, packs and ranks does not change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from finetuner.data.batch import Batch
from finetuner.model.causal_lm import CausalLearner


class NonFinite(Exception):
    """A gradient's norm is not a number or infinite; the update was not applied. `where` names parameters."""

    def __init__(self, norm: float, where: str) -> None:
        super().__init__(f"the gradient's norm is {norm} ({where})")
        self.norm, self.where = norm, where


class Engine(Protocol):
    """Forward, backward and update of one learner."""

    learner: CausalLearner

    def accumulate(self, batch: Batch, learned: int, *, last: bool) -> Tensor:
        """Adds the gradient of one micro-batch and gives its summed loss, detached.

        `learned` is the learned tokens of the whole step, the divisor; `last` marks a step's last micro-batch, at which
        ranks exchange.
        """
        ...

    def step(self, factor: float) -> float:
        """Clips, updates with each group's rate times `factor`, clears the gradients; gives the norm before clipping.

        Raises:
            NonFinite: before anything was updated.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes trained weights in full precision and the optimizer's state, by name."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit for bit."""
        ...
