"""FSDP2: torch's own `fully_shard`; each rank holds a piece of every parameter, gradient and moment.

    decoder layers, each a unit -> embedding, norms and head: the unit of the learner itself -> pieces -> AdamW

- A unit is gathered when its module is called and let go after it. The learner's own, in which embedding and head lie,
  tied or not, is gathered once a micro-batch. Layers are gathered for the forward pass and, with `reshard`, again for
  the backward pass; without it they stay meanwhile, at the memory of the whole model.
- Masters are sharded, gathered and reduced in float32 and computed through autocast, as on one device: a precision
  policy of FSDP would round norms and the residual stream to bfloat16.
- Gradients are summed over the ranks after each micro-batch. Summing after the last one only would save traffic, and
  hold a whole float32 gradient on each rank meanwhile.
- The optimizer is given this rank's pieces as plain tensors and knows nothing of shards: its update goes element by
  element, so that of the pieces is that of the whole.
- State is written by name, as ranges of elements, and not as torch's distributed checkpoints: any engine on any number
  of ranks goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from finetuner.config.run import FSDP, AdamW
from finetuner.data.batch import Batch
from finetuner.engine.optim import Group, build_optimizer, groups
from finetuner.engine.pieces import Piece, local, pieces_of, restore, state_of_pieces
from finetuner.engine.saved import open_state
from finetuner.engine.state import State
from finetuner.engine.update import update
from finetuner.engine.watch import LAG, Watch
from finetuner.errors import ConfigError, Problem
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.layers import decoder_layers
from finetuner.runtime.log import say
from finetuner.runtime.ranks import is_main, rank, world


class FSDPEngine:
    """An `Engine` whose ranks share one model."""

    together = True

    def __init__(self, learner: CausalLearner, fsdp: FSDP, optim: AdamW, device: torch.device) -> None:
        self.learner = learner
        self._device, self._clip = device, optim.clip
        shard(learner, fsdp, mesh(device))
        self._apart()
        self._named = learner.trainable()
        check_ranks(self._named)
        self.groups = groups(learner, self._named, optim)
        self._pieces = pieces_of(self._named, rank(), world())
        self.optimizer = build_optimizer(own_groups(self.groups, self._pieces), optim, device)
        self._watch = Watch(device, LAG if device.type == "cuda" else 0)
        learner.together, learner.whole = True, self._whole

    def accumulate(self, batch: Batch, learned: int, *, last: bool) -> Tensor:
        loss: Tensor = self.learner(batch)
        # FSDP gives the ranks' sum: see `shard`.
        (loss / learned).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, number: int, factor: float, loss: Tensor) -> Tensor:
        for piece in self._pieces:
            piece.take_gradient()
        owned = [piece.own for piece in self._pieces]
        norm = whole_norm([own.grad for own in owned if own.grad is not None], self._device)
        self._watch.see(number, loss, norm)
        update(self.optimizer, owned, norm, clip=self._clip, factor=factor, spoiled=self._watch.spoiled)
        return norm

    def settle(self) -> None:
        self._watch.read()

    def suspects(self) -> str:
        names = []
        for name, parameter in self._named:
            bad = torch.zeros((), device=self._device)
            if parameter.grad is not None:
                bad += (~torch.isfinite(local(parameter.grad))).any().to(bad)
            dist.all_reduce(bad)
            names += [name] * bool(bad)
            parameter.grad = None
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def state(self) -> State:
        return state_of_pieces(self.optimizer, self._pieces)

    def weights(self) -> Mapping[str, Tensor]:
        self._apart()
        gathered = {}
        # A model's folder holds its frozen weights, too, and they are cut like the others.
        frozen = {} if self.learner.adapted else dict(self.learner.model.named_parameters())
        for name, tensor in (frozen | self.learner.changing()).items():
            whole = tensor.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if is_main():
                gathered[name] = whole.to("cpu", copy=True)
        return gathered

    def load(self, folder: Path) -> None:
        saved = open_state(folder)
        saved.check(type(self.optimizer).__name__, {name: parameter.shape for name, parameter in self._named})
        self._apart()
        restore(saved, self.optimizer, self._pieces)

    def _apart(self) -> None:
        """Lets go what a pass without a backward one has left gathered."""
        for module in self.learner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """In the block the learner's own unit is gathered, for who calls parts of it; layers gather themselves."""
        assert isinstance(self.learner, FSDPModule)
        self.learner.unshard()
        try:
            yield
        finally:
            self._apart()


def mesh(device: torch.device) -> DeviceMesh:
    """All ranks in a line; one process is a group of its own."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(device.type, (world(),))


def shard(learner: CausalLearner, fsdp: FSDP, mesh: DeviceMesh) -> None:
    """Cuts the learner's parameters, frozen ones too, over the ranks of `mesh`: unit by unit, so that on the device
    there is never more whole than one unit."""
    layers = decoder_layers(learner.causal)
    if not layers:
        say(f"the layers of {type(learner.causal).__name__} are not known one by one: it is gathered as a whole")
    offload = CPUOffloadPolicy() if fsdp.offload == "cpu" else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=fsdp.reshard, offload_policy=offload)
    fully_shard(learner, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
    for module in learner.modules():
        if isinstance(module, FSDPModule):
            # The sum over ranks, and no mean. As a plain sum: gloo knows no sum with a factor in it.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # torch takes the unit that is called first for the outermost: it must not be a layer that answers a question.
    with learner.evaluating(), torch.no_grad():
        learner(one_token())


def one_token() -> Batch:
    """A row of one token that teaches something."""
    one_1T = torch.ones(1, 1, dtype=torch.int32)
    return Batch(one_1T, one_1T, torch.zeros_like(one_1T), (1,), (), 1)


def own_groups(parted: list[Group], held: list[Piece]) -> list[Group]:
    """The groups of the whole model with this rank's pieces in them."""
    own = {piece.name: piece.own for piece in held}
    filled = [Group(g.rate, g.decay, tuple((name, own[name]) for name, _ in g.named if name in own)) for g in parted]
    return [group for group in filled if group.named]


def check_ranks(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuses more processes than can each hold something: the last one holds the least.

    Raises:
        ConfigError: E-FSDP-RANKS.
    """
    if not any(len(parameter) > (world() - 1) * -(-len(parameter) // world()) for _, parameter in named):
        what, fits = "there are processes that would hold no part of a trained parameter", "fewer processes"
        raise ConfigError(Problem("E-FSDP-RANKS", what, "engine", f"{world()} processes", fits, "lower --nproc"))


def whole_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Norm of the gradient whose pieces the ranks hold."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        square += nn.utils.get_total_norm(gradients).to(square).square()
    dist.all_reduce(square)
    return square.sqrt().float()
