"""What performs an optimizer step, whatever machinery is below.

The gradients of a step are the SUM over its batches and ranks of each batch's summed loss, divided by the learned
tokens of the whole step: how a step is cut into micro-batches, packs and ranks does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from finetuner.data.batch import Batch
from finetuner.engine.state import State
from finetuner.model.causal_lm import CausalLearner


class NonFinite(Exception):
    """The loss or the gradient's norm of step `step` is not a number or infinite; no update was made since."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient's norm {norm}")
        self.step, self.loss, self.norm = step, loss, norm


class Engine(Protocol):
    """Forward, backward and update of one learner."""

    learner: CausalLearner
    together: bool
    """Whether every rank must take part in each forward, as where each holds a shard of the weights."""

    def accumulate(self, batch: Batch, learned: int, *, last: bool) -> Tensor:
        """Adds the gradient of one micro-batch and gives its summed loss, detached.

        `learned` is the learned tokens of the whole step, the divisor; `last` marks a step's last micro-batch, at which
        ranks exchange.
        """
        ...

    def step(self, number: int, factor: float, loss: Tensor) -> Tensor:
        """Clips, updates with each group's rate times `factor`, clears the gradients; gives the norm before clipping.

        `number` counts from 0; `loss` is the step's mean over all ranks, float64. Neither is waited for.

        Raises:
            NonFinite: of this step or an earlier one; the weights are those before it.
        """
        ...

    def settle(self) -> None:
        """Waits for the steps that are under way.

        Raises:
            NonFinite: one of them was not finite.
        """
        ...

    def suspects(self) -> str:
        """Names of parameters whose gathered gradient is not finite; clears the gradients."""
        ...

    def state(self) -> State:
        """What this rank holds of the trained weights in full precision and of the optimizer's state, by name.

        They are the live tensors, unless the engine must copy to give them. All ranks call it.
        """
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """What `learner.changing` gives, whole, on the main rank; nothing on the others. All ranks call it.

        Sharded ones are gathered on the host, tensor by tensor.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restores what ranks of any engine wrote of a `state`, bit for bit. All ranks call it."""
        ...
