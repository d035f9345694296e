"""A `Run`'s engine."""

from __future__ import annotations

import torch

from finetuner.config.run import Run
from finetuner.engine.engine import Engine
from finetuner.engine.torch_engine import TorchEngine
from finetuner.model.causal_lm import CausalLearner


def build_engine(run: Run, learner: CausalLearner, device: torch.device) -> Engine:
    """The engine that `run.engine` names, around `learner`."""
    return TorchEngine(learner, run.optim, device)
