"""DeepSpeed's ZeRO: optimizer state, gradients and weights cut over the ranks, by stage.

- Trained weights, gradients and what ranks exchange are float32; autocast computes in the model's dtype. Of P trained
  weights on N ranks a rank holds, in bytes: 16 P in stage 0; 8 P + 12 P / N in stage 1, as the masters beside the
  weights are copies; of those 4 P / N are gradients from stage 2 on; some 16 P / N in stage 3.
- DeepSpeed divides by the number of ranks; `accumulate` multiplies by it, and nothing else knows of it.
- Groups, rates and schedule are ours: it steps torch's own AdamW over its flat pieces.
- A state is written by name and elements, as any engine writes it: see `zero_pieces.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from finetuner.config.run import Run, ZeRO
from finetuner.data.batch import Batch
from finetuner.engine.engine import NonFinite
from finetuner.engine.optim import build_optimizer, groups
from finetuner.engine.saved import open_state
from finetuner.engine.state import State, nothing
from finetuner.engine.zero import deepspeed_config
from finetuner.engine.zero_pieces import pieces_of, restore, state_of_pieces
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.shards import shape_of
from finetuner.runtime.ranks import is_main, rank, world


class DeepSpeedEngine:
    """An `Engine` through `deepspeed.initialize`."""

    def __init__(self, learner: CausalLearner, run: Run, device: torch.device) -> None:
        assert isinstance(run.engine, ZeRO)
        join(device)
        self.learner = learner
        self._stage, self._clip, self._device = run.engine.stage, run.optim.clip, device
        self.together = self._stage == 3
        self._named = learner.trainable()
        self.groups = groups(learner, self._named, run.optim)
        self.optimizer = build_optimizer(self.groups, run.optim, device)
        self._engine, *_ = deepspeed.initialize(
            model=learner, optimizer=self.optimizer, config=deepspeed_config(run), dist_init_required=False
        )
        # From stage 2 on ranks exchange during the backward pass, in its order: a row that teaches nothing has it, too.
        learner.together = self._stage >= 2
        self._ended = False

    def accumulate(self, batch: Batch, learned: int, *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(batch)
        # DeepSpeed gives the ranks' mean; the sum is wanted.
        self._engine.backward(loss * (world() / learned))
        return loss.detach()

    def step(self, number: int, factor: float, loss: Tensor) -> Tensor:
        if not bool(torch.isfinite(loss)):
            self._engine.optimizer.zero_grad()
            raise NonFinite(number, float(loss), float("nan"))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        norm = self._clipped() if self._stage == 0 else None
        if norm is None or bool(torch.isfinite(norm)):
            self._engine.step()
        if norm is None:
            # An update that is not finite was left out by DeepSpeed itself.
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._device)
        if not bool(torch.isfinite(norm)):
            self._engine.optimizer.zero_grad()
            raise NonFinite(number, float(loss), float(norm))
        return norm.detach().clone()

    def settle(self) -> None:
        """Each step's verdict is known when it ends."""

    def suspects(self) -> str:
        names = []
        for name, parameter in self._named:
            gradient = safe_get_full_grad(parameter)
            bad = torch.zeros((), device=self._device)
            if gradient is not None:
                bad += (~torch.isfinite(gradient)).any().to(bad)
            torch.distributed.all_reduce(bad)
            names += [name] * bool(bad)
        self._engine.optimizer.zero_grad()
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def state(self) -> State:
        if self._stage == 0 and not is_main():
            return nothing()
        return state_of_pieces(self.optimizer, pieces_of(self._named, self._engine.optimizer, self._stage, rank()))

    def weights(self) -> Mapping[str, Tensor]:
        if self._stage < 3:
            return self.learner.changing() if is_main() else {}
        kept: dict[str, Tensor] = {}
        changing = self.learner.changing().keys()
        for name, tensor in [*self.learner.model.named_parameters(), *self.learner.model.named_buffers()]:
            if name not in changing and (self.learner.adapted or not isinstance(tensor, nn.Parameter)):
                continue
            with deepspeed.zero.GatheredParameters([tensor] if isinstance(tensor, nn.Parameter) else []):
                if is_main():
                    kept[name] = tensor.detach().to("cpu", copy=True)
        return kept

    def load(self, folder: Path) -> None:
        saved = open_state(folder)
        saved.check(type(self.optimizer).__name__, {name: shape_of(parameter) for name, parameter in self._named})
        zero = self._engine.optimizer
        if self._stage == 3:
            zero._partition_all_parameters()
        restore(saved, self.optimizer, pieces_of(self._named, zero, self._stage, rank()))
        spread(zero, self._stage)

    def _clipped(self) -> Tensor:
        """The gradient's norm; the gradient is clipped by it."""
        parameters = [parameter for _, parameter in self._named]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        return norm


def join(device: torch.device) -> None:
    """Makes DeepSpeed know the group of processes; one process is a group of its own. No MPI is asked."""
    alone = {"RANK": rank(), "WORLD_SIZE": world(), "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    # DeepSpeed calls torch's collectives by names that torch renames: hundreds of lines that are nobody's here.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@torch.no_grad()
def spread(zero: Any, stage: int) -> None:
    """Brings what the pieces hold into the weights that the model computes with."""
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3:
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
