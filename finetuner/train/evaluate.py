"""Validation loss: the mean over all learned tokens, whatever the batch size and the number of ranks.

Nothing of it changes the training that follows: no gradients, no dropout, every module's mode put back, and the next
step seeds its own random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetuner.data.batch import Batch
from finetuner.model.causal_lm import CausalLearner
from finetuner.runtime import dist


def validation_loss(learner: CausalLearner, batches: Sequence[Batch]) -> float:
    """Sum of the losses of this rank's `batches`, and all other ranks', over their learned tokens."""
    sums = torch.zeros(2, dtype=torch.float64)
    with learner.evaluating(), torch.no_grad():
        for batch in batches:
            sums += torch.tensor([float(learner(batch)), batch.learned], dtype=torch.float64)
    dist.total(sums)
    return float(sums[0] / sums[1])
