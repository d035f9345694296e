"""The pieces of a sharded model's trained parameters that one rank holds, as plain tensors that an optimizer steps.

    parameter of 5 x 4 on 2 ranks -> rank 0 holds elements 0..12, rank 1 12..20; of one of 1 x 4 rank 1 holds nothing

- torch's `fully_shard` cuts along the first dimension, so a piece is one range of the flattened parameter.
- A piece shares its memory with the shard: what the optimizer writes there is the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from finetuner.engine.saved import Saved
from finetuner.engine.state import BY_ELEMENT, State, entry, state_of


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What this rank holds of one parameter: at least one element."""

    name: str
    whole: nn.Parameter
    """As torch shards it."""
    own: nn.Parameter
    """1-D, the elements start..stop."""
    start: int
    stop: int

    def take_gradient(self) -> None:
        """Moves the gradient from the sharded parameter to the piece."""
        gradient = self.whole.grad
        self.own.grad = None if gradient is None else local(gradient)
        self.whole.grad = None

    def shaped(self, elements: Tensor) -> Tensor:
        """Its elements in the parameter's shape, where the piece is all of it."""
        is_all = self.stop - self.start == self.whole.numel()
        return elements.view(self.whole.shape) if is_all else elements


def pieces_of(named: Iterable[tuple[str, nn.Parameter]], rank: int, world: int) -> list[Piece]:
    """The pieces of this rank, in the order of the names; parameters of which it holds nothing are left out."""
    found = []
    for name, parameter in named:
        start, stop = bounds(parameter.shape, rank, world)
        own = local(parameter.detach())
        assert own.numel() == stop - start, (name, parameter.shape, own.numel())
        if start < stop:
            found.append(Piece(name, parameter, nn.Parameter(own), start, stop))
    return found


def bounds(shape: torch.Size, rank: int, world: int) -> tuple[int, int]:
    """The elements start..stop that a rank holds: as many rows as the fullest rank, until there are none left."""
    rows, size = -(-shape[0] // world), shape[1:].numel()
    return min(rank * rows, shape[0]) * size, min((rank + 1) * rows, shape[0]) * size


@torch.no_grad()
def local(sharded: Tensor) -> Tensor:
    """This rank's elements of a sharded tensor, 1-D, in the memory where they lie."""
    assert isinstance(sharded, DTensor), "not sharded, or gathered at the moment"
    return sharded.to_local().view(-1)


def state_of_pieces(optimizer: Optimizer, held: Sequence[Piece]) -> State:
    """What the rank writes: its pieces and their moments, by name."""
    plain = state_of(optimizer, {piece.name: piece.shaped(piece.own.detach()) for piece in held})
    moments, parameters = dict(plain.moments), dict(plain.parameters)
    for piece in held:
        kept = parameters[piece.name]
        parameters[piece.name] = entry(piece.whole.shape, kept["states"], kept["numbers"])
        for key in set(BY_ELEMENT) & set(kept["states"]):
            moments[f"{key}/{piece.name}"] = piece.shaped(moments[f"{key}/{piece.name}"])
    parts = {piece.name: (piece.start, piece.stop) for piece in held}
    return dataclasses.replace(plain, parameters=parameters, moments=moments, parts=parts)


@torch.no_grad()
def restore(saved: Saved, optimizer: Optimizer, held: Sequence[Piece]) -> None:
    """Gives each piece the elements that were saved of it, weights and moments, whoever wrote them."""
    for piece in held:
        name, start, stop = piece.name, piece.start, piece.stop
        piece.own.copy_(saved.master(name, start, stop))
        state: dict[str, Any] = dict(saved.parameters[name]["numbers"])
        for key in saved.states(name):
            value = saved.moment(key, name, start, stop) if key in BY_ELEMENT else saved.single(key, name)
            state[key] = value.to(piece.own.device)
        if state:
            optimizer.state[piece.own] = state
