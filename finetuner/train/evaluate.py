"""Validation loss: the mean over all learned tokens, whatever the batch size and the number of ranks.

Nothing of it changes the training that follows: no gradients, no dropout, every module's mode put back, and the next
step seeds its own random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from finetuner.data.batch import Batch
from finetuner.model.causal_lm import CausalLearner
from finetuner.runtime import dist


def validation_loss(learner: CausalLearner, batches: Sequence[Batch]) -> float:
    """Sum of the losses of this rank's `batches`, and all other ranks', over their learned tokens."""
    sums = torch.zeros(2, dtype=torch.float64)
    with at_rest(learner), torch.no_grad():
        for batch in batches:
            sums += torch.tensor([float(learner(batch)), batch.learned], dtype=torch.float64)
    dist.total(sums)
    return float(sums[0] / sums[1])


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside; afterwards each module is as it was, the frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
