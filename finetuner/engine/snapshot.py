"""Copies on the host of tensors that training goes on changing, so that they can be written meanwhile.

    copies = Copies()
    copies.fits(tensors) -> copies.take(tensors) -> written in the background -> copies.take(tensors) -> ...

- The memory is kept from one time to the next: what fitted once fits always, and is not fetched from the system again.
  So what was taken holds until the next `take`.
- From a GPU the copies go into pinned memory, all at once; `take` waits for them, as it must.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from finetuner.runtime.memory import available

SHARE = 0.8
"""Of the memory that is free, what copies may take: weights are cast into some of the rest when they are written."""

Place: TypeAlias = tuple[torch.device, int, torch.Size, tuple[int, ...], torch.dtype]


class Copies:
    """Host memory for one snapshot."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def needs(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes that copies of `tensors` would take beyond what is kept already."""
        return sum(
            size(tensors[name]) for name, own in _owners(tensors).items() if name == own and self._is_new(name, tensors)
        )

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the machine has the memory; a system that does not say is taken to have it."""
        free = available()
        return free is None or self.needs(tensors) <= SHARE * free

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of each, as it stands now; what shares its memory, as tied matrices do, shares it here."""
        owners = _owners(tensors)
        for name, own in owners.items():
            if name != own:
                continue
            tensor = tensors[name]
            if self._is_new(name, tensors):
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._kept[own] for name, own in owners.items()}

    def _is_new(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        kept = self._kept.get(name)
        return kept is None or kept.shape != tensors[name].shape or kept.dtype != tensors[name].dtype


def size(tensor: Tensor) -> int:
    """Bytes that a copy takes; torch's pinned memory comes in powers of two (ATen/core/CachingHostAllocator.h)."""
    return 1 << max(0, tensor.nbytes - 1).bit_length() if tensor.is_cuda else tensor.nbytes


def _owners(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By each name the first name under which the same memory stands: its own, but for tied tensors."""
    first: dict[Place, str] = {}
    return {name: first.setdefault(_place(tensor), name) for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> Place:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
