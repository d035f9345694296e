"""`deal`: which packs of a step each rank takes in each micro-batch, so that no rank waits long for another.

- Packs are laid into as many cells as there are (rank, micro-batch), the costliest first, each into the cheapest cell
  with room (Graham 1969, longest processing time first).
- Cells of like cost stand in one micro-batch, since sharded ranks wait for each other in every one; within it, the rank
  that has had least so far takes the costliest, since all ranks wait for each other at the end of a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PAIR = 1 / (12 * 4096)
"""Cost of a pair of tokens in a document, where a token costs 1. A layer of width h does about 24 h^2 operations for a
token (its 12 h^2 weights, twice) and 2 h for a pair (scores and values, half of them behind the causal border). The
width is that of 7B models: packs are full, so what orders them is the sum of squares, whatever the width."""


def cost(lengths: npt.NDArray[np.int64]) -> float:
    """What documents of these lengths cost, in tokens."""
    own = lengths.astype(np.float64)
    return float(own.sum() + PAIR * (own * own).sum())


def deal(costs: Sequence[float], world: int, per_device: int) -> list[list[tuple[int, ...]]]:
    """Places of the costs, by rank and micro-batch; at most `per_device` in each.

    costs (9, 1, 5, 5), world 2, per_device 2 -> [[(0, 1)], [(2, 3)]]
    """
    count = -(-len(costs) // (world * per_device))
    cells = _lay(costs, world * count, per_device)
    sums = [sum(costs[place] for place in cell) for cell in cells]
    order = sorted(range(len(cells)), key=lambda cell: -sums[cell])
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
    had = [0.0] * world
    for start in range(0, len(cells), world):
        ranks = sorted(range(world), key=had.__getitem__)
        for rank, cell in zip(ranks, order[start : start + world]):
            dealt[rank].append(tuple(sorted(cells[cell])))
            had[rank] += sums[cell]
    return dealt


def _lay(costs: Sequence[float], number: int, room: int) -> list[list[int]]:
    """So many cells with at most `room` places in each, of costs as like as the greedy way makes them."""
    cells: list[list[int]] = [[] for _ in range(number)]
    cheapest = [(0.0, cell) for cell in range(number)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        had, cell = heapq.heappop(cheapest)
        cells[cell].append(place)
        if len(cells[cell]) < room:
            heapq.heappush(cheapest, (had + costs[place], cell))
    return cells
