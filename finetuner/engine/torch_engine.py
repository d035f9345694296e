"""Plain torch: one process, or data parallel over several with torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetuner.config.run import AdamW
from finetuner.data.batch import Batch
from finetuner.engine.optim import build_optimizer, groups
from finetuner.engine.restore import load_state
from finetuner.engine.state import State, nothing, state_of
from finetuner.engine.update import update
from finetuner.engine.watch import LAG, Watch
from finetuner.model.causal_lm import CausalLearner
from finetuner.runtime.ranks import is_main, world


class TorchEngine:
    """An `Engine` on one device of each rank; every rank holds the whole model, and the main rank saves it."""

    together = False

    def __init__(self, learner: CausalLearner, optim: AdamW, device: torch.device) -> None:
        self.learner = learner
        self._device = device
        self._clip = optim.clip
        self._named = learner.trainable()
        self.groups = groups(learner, self._named, optim)
        self.optimizer = build_optimizer(self.groups, optim, device)
        # Only fused optimizers leave out an update by themselves; with others each verdict is waited for.
        self._skips = bool(self.optimizer.defaults.get("fused"))
        self._watch = Watch(device, LAG if self._skips and device.type == "cuda" else 0)
        self._model: nn.Module = learner
        if world() > 1:
            ids = [device] if device.type == "cuda" else None
            self._model = DistributedDataParallel(learner, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, batch: Batch, learned: int, *, last: bool) -> Tensor:
        with self._exchange(last):
            loss: Tensor = self._model(batch)
            # DistributedDataParallel gives the ranks' mean; the sum is wanted.
            (loss * (world() / learned)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, number: int, factor: float, loss: Tensor) -> Tensor:
        parameters = [parameter for _, parameter in self._named]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._watch.see(number, loss, norm)
        spoiled = self._watch.spoiled if self._skips else None
        update(self.optimizer, parameters, norm, clip=self._clip, factor=factor, spoiled=spoiled)
        return norm

    def settle(self) -> None:
        self._watch.read()

    def state(self) -> State:
        return state_of(self.optimizer, self.learner.masters()) if is_main() else nothing()

    def weights(self) -> Mapping[str, Tensor]:
        return self.learner.changing() if is_main() else {}

    def load(self, folder: Path) -> None:
        self.learner.load_masters(load_state(folder, self.optimizer))

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def suspects(self) -> str:
        names = [name for name, p in self._named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        self.optimizer.zero_grad(set_to_none=True)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
