"""The elements of the trained parameters that one rank's DeepSpeed optimizer steps, by name.

    stages 1, 2   the parameters of a group lie flat behind one another, and each rank has an equal range of that
    stage 3       each parameter is cut by itself, into as many equal ranges as ranks, the last one padded

Either way a rank's part of a parameter is one range of its elements, and lies as one range in a flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetuner.engine.saved import Saved
from finetuner.engine.state import BY_ELEMENT, State, entry
from finetuner.model.shards import shape_of


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Elements start..stop of a parameter, which lie in `flat` from `offset` on."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    stop: int
    flat: Tensor
    """What the optimizer steps, of one dimension but for stage 0."""
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements of `flat`, or of a state of the same size; in the parameter's shape if that is all of it."""
        own = tensor.detach().view(-1).narrow(0, self.offset, self.stop - self.start)
        return own.view(self.shape) if own.numel() == self.shape.numel() else own


def pieces_of(named: Iterable[tuple[str, nn.Parameter]], zero: Any, stage: int, rank: int) -> list[Piece]:
    """This rank's pieces; parameters of which it holds nothing are left out. `zero` is DeepSpeed's optimizer."""
    held = []
    for name, parameter in named:
        shape = shape_of(parameter)
        if stage == 0:
            held.append(Piece(name, shape, 0, shape.numel(), parameter, 0))
        elif stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                own, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                held.append(Piece(name, shape, own.start, own.start + own.numel, flat, place.start))
        else:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start, stop = rank * size, min((rank + 1) * size, shape.numel())
            if start < stop:
                held.append(Piece(name, shape, start, stop, zero.fp32_partitioned_groups_flat[group], offset))
    return held


def state_of_pieces(optimizer: Optimizer, held: Sequence[Piece]) -> State:
    """What the rank writes: the pieces and their moments."""
    parameters, moments, masters = {}, {}, {}
    for piece in held:
        state = optimizer.state.get(piece.flat, {})
        for key, value in state.items():
            moments[f"{key}/{piece.name}"] = piece.of(value) if key in BY_ELEMENT else value
        parameters[piece.name] = entry(piece.shape, list(state))
        masters[piece.name] = piece.of(piece.flat)
    parts = {piece.name: (piece.start, piece.stop) for piece in held}
    return State(type(optimizer).__name__, parameters, moments, masters, parts)


@torch.no_grad()
def restore(saved: Saved, optimizer: Optimizer, held: Sequence[Piece]) -> None:
    """Gives each piece the elements that were saved of it, weights and moments, whoever wrote them."""
    for piece in held:
        name, start, stop = piece.name, piece.start, piece.stop
        piece.of(piece.flat).view(-1).copy_(saved.master(name, start, stop))
        state = optimizer.state[piece.flat]
        for key in saved.states(name):
            if key in BY_ELEMENT:
                whole = state.setdefault(key, torch.zeros_like(piece.flat))
                piece.of(whole).view(-1).copy_(saved.moment(key, name, start, stop))
            else:
                state[key] = saved.single(key, name).to(piece.flat.device)
        if not state:
            del optimizer.state[piece.flat]
