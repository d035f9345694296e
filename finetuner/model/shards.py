"""`Shards`: what loading a model asks of an engine that cuts weights over the ranks before they are whole anywhere.

A cut parameter's own tensor is empty; its shape is asked for here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn


class Shards(Protocol):
    """How weights lie on the ranks, while there is no engine yet."""

    cuts: bool
    """Whether a rank holds a part of each weight only."""

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """A block in which a model's weights, held in `dtype`, go to where they will lie as they are read."""
        ...

    def held(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """What this rank holds of each parameter, by name."""
        ...

    def in_turn(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which each module's weights are whole while it is called. All ranks call together."""
        ...


class Whole:
    """The `Shards` of a model that every rank holds."""

    cuts = False

    def loading(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def held(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from model.named_parameters()

    def in_turn(self, model: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


WHOLE = Whole()


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where DeepSpeed has cut it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(shape)
