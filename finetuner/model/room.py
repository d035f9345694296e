"""How many decoder layers must recompute so that a row fits: arithmetic on bytes, and what a device has free.

    held(k) = inputs of k checkpointed layers + activations of the others + the largest layer once more + the head

The largest layer counts once more for what the backward pass holds besides: a recomputed layer, or its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetuner.runtime.memory import available
from finetuner.runtime.ranks import world

SHARE = 0.9
"""Of the free memory that is planned with; the rest is for what an allocator cannot hand out."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a decoder layer keeps of a row until the backward pass, in bytes."""

    plain: int
    checkpointed: int
    """Its input; 0 where that is offloaded."""


def held(layers: Sequence[Kept], count: int, head: int) -> int:
    """Bytes of a row's activations at their peak, with the first `count` layers checkpointed."""
    inputs = sum(layer.checkpointed for layer in layers[:count])
    return inputs + sum(layer.plain for layer in layers[count:]) + max(layer.plain for layer in layers) + head


def fewest(layers: Sequence[Kept], room: int, head: int) -> int:
    """The smallest number of checkpointed layers with which a row fits into `room` bytes; all where none does."""
    counts = range(len(layers) + 1)
    return next((count for count in counts if held(layers, count, head) <= room), len(layers))


def grown(short: int, middle: int, long: int, *, times: float) -> int:
    """What rows of 1, 2, 3 units say of a row of t units: slope t + bend t^2 through the three; (5, 7, 9), 10 -> 20.

    The constant is left out: it is weights that are cast for the row, which are counted elsewhere.
    """
    bend = (long - 2 * middle + short) / 2
    slope = middle - short - 3 * bend
    return max(0, round(slope * times + bend * times * times))


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on `device`; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = available()
    return None if free is None else free // world()  # the ranks of a CPU run share one machine
