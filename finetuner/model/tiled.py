"""The MLP of each decoder layer, a tile of tokens at a time: its inner values never exist for a whole row.

    forward:   for each tile: mlp(tile) -> its place in the output;  only the input is kept
    backward:  for each tile: mlp(tile) again -> gradient of the tile, and of the weights, summed over the tiles

- Of T tokens and a tile of S, S x intermediate is held instead of T x intermediate, for one more forward of the MLP.
- Gradients of the weights are summed in the weights' own dtype, into one buffer each.
- Dropout inside draws other noise than in one piece: a tile's after the other's.
- The MLP itself stays as it is (adapter, 4-bit weights): its `forward` is wrapped, no name of a parameter changes.

Sequence tiling: Bekman et al. 2025, "Arctic Long Sequence Training", arXiv:2506.13996.

Shapes: T tokens of the row, S tokens of a tile, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from finetuner.errors import ModelError, Problem
from finetuner.model.causal_lm import CausalLearner, moved
from finetuner.model.layers import decoder_layers

Compute = Callable[[Tensor], Tensor]


def tile(learner: CausalLearner, tokens: int) -> None:
    """Lets the learner's layers take their MLP in tiles of `tokens`.

    Raises: ModelError where its MLPs cannot be tiled.
    """
    mlps = tileable(learner.causal)
    check_apart(learner, mlps[0])
    for mlp in mlps:
        mlp.forward = tiled(mlp, tokens)


def tileable(model: PreTrainedModel) -> list[nn.Module]:
    """The MLP of each decoder layer.

    Raises: ModelError where a layer has none, or several of which a router chooses.
    """
    mlps = [dict(layer.named_children()).get("mlp") for layer in decoder_layers(model)]
    sound = [mlp for mlp in mlps if mlp is not None]
    if not sound or len(sound) < len(mlps):
        raise untileable(model, f"layers without a part named mlp: {len(mlps) - len(sound)} of {len(mlps)}")
    if any(has_experts(mlp) for mlp in sound):
        raise untileable(model, "a mixture of experts")
    return sound


def has_experts(mlp: nn.Module) -> bool:
    """Whether it holds several networks: as a list, or stacked in one tensor."""
    return any(isinstance(part, nn.ModuleList) for part in mlp.modules()) or any(p.ndim > 2 for p in mlp.parameters())


def untileable(model: PreTrainedModel, found: str) -> ModelError:
    what, fits = f"the MLPs of {type(model).__name__} cannot be taken in tiles", "layers that have one MLP each"
    return ModelError(Problem("E-TILED", what, "model.tiled_mlp", found, fits, "model.tiled_mlp=None"))


@torch.no_grad()
def check_apart(learner: CausalLearner, mlp: nn.Module) -> None:
    """Refuses an MLP in which one token's output depends on another token.

    Raises: ModelError.
    """
    size = learner.causal.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden_1TD = torch.randn(1, 6, size, generator=generator).to(learner.device, learner.compute)
    with learner.evaluating(), learner.autocast():
        whole, apart = mlp(hidden_1TD), in_tiles(mlp, hidden_1TD, 2)
    if moved(apart, whole, learner.compute):
        raise untileable(learner.causal, "its tokens see each other in the MLP")


def tiled(mlp: nn.Module, tokens: int) -> Compute:
    """`mlp`'s forward, in tiles."""
    compute: Compute = mlp.forward

    def forward(hidden_1TD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_tiles(compute, hidden_1TD, tokens)
        trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        out_1TD: Tensor = Tiles.apply(compute, hidden_1TD, tokens, *trained)  # type: ignore[no-untyped-call]
        return out_1TD

    return forward


def in_tiles(compute: Compute, hidden_1TD: Tensor, tokens: int) -> Tensor:
    """compute(hidden), a tile at a time, into one output."""
    out_1TD = None
    for place in tiles_of(hidden_1TD.shape[-2], tokens):
        part_1SD = compute(hidden_1TD[..., place, :])
        if out_1TD is None:
            out_1TD = part_1SD.new_empty(hidden_1TD.shape)
        out_1TD[..., place, :] = part_1SD
    assert out_1TD is not None, "a row has a token"
    return out_1TD


def tiles_of(length: int, tokens: int) -> Iterator[slice]:
    """5 in tiles of 2 -> 0:2, 2:4, 4:5."""
    return (slice(start, min(start + tokens, length)) for start in range(0, length, tokens))


class Tiles(torch.autograd.Function):
    """compute(hidden) tile by tile, and its gradients by computing each tile once more.

    The trained parameters are inputs too, so that each gets its gradient once, whoever waits for it (data parallel).
    """

    @staticmethod
    def forward(ctx: Any, compute: Compute, hidden_1TD: Tensor, tokens: int, *trained: Tensor) -> Tensor:
        kind = hidden_1TD.device.type
        ctx.save_for_backward(hidden_1TD)
        ctx.compute, ctx.tokens, ctx.trained = compute, tokens, trained
        # A weight cast in here has no gradient: kept for the rest of the forward pass, it would reach a later use.
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = partial(torch.autocast, kind, dtype, enabled, cache_enabled=False)
        ctx.generator, (ctx.devices, ctx.generators) = torch.get_rng_state(), get_device_states(hidden_1TD)
        with ctx.autocast():
            return in_tiles(compute, hidden_1TD, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1TD: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_1TD,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        into_1TD = torch.empty_like(hidden_1TD) if wanted else None
        sums = [torch.zeros_like(parameter) for parameter in ctx.trained]
        with torch.random.fork_rng(devices=ctx.devices):
            torch.set_rng_state(ctx.generator)
            set_device_states(ctx.devices, ctx.generators)
            for place in tiles_of(hidden_1TD.shape[-2], ctx.tokens):
                tile_1SD = hidden_1TD[..., place, :].detach().requires_grad_(wanted)
                found_1SD = gradients(ctx, tile_1SD, grad_1TD[..., place, :], sums)
                if into_1TD is not None:
                    into_1TD[..., place, :] = found_1SD
        return None, into_1TD, None, *sums


def gradients(ctx: Any, tile_1SD: Tensor, grad_1SD: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """The gradient of one tile, if it wants one; those of the trained parameters are added to `sums`."""
    with torch.enable_grad(), ctx.autocast():
        out_1SD = ctx.compute(tile_1SD)
    inputs = [*ctx.trained, *([tile_1SD] if tile_1SD.requires_grad else [])]
    found = torch.autograd.grad(out_1SD, inputs, grad_1SD, allow_unused=True)
    for total, part in zip(sums, found):
        if part is not None:
            total += part
    return found[-1]
