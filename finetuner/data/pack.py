"""`pack`: which samples lie together in a row of `capacity` tokens, whole and each exactly once.

The samples are shuffled, taken window by window, and laid by best-fit decreasing (Johnson 1973): the longest first,
each into the fullest pack that has room. The free spaces of the open packs are the bits of one integer, so that the
fullest is one shift and one lowest bit away: a million samples take about a second.

- A window of `look_ahead` samples keeps a pack's company random: packing all at once would always put the same lengths
  together. The emptiest pack of a window is taken apart and goes into the next window.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt

from finetuner.data.order import permutation

LOOK_AHEAD = 1 << 14


def pack(
    lengths: npt.NDArray[np.integer], capacity: int, *, look_ahead: int = LOOK_AHEAD, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(members, bounds): pack k holds the samples `members[bounds[k]:bounds[k + 1]]`.

    lengths (5, 3, 4), capacity 8 -> members [0, 1, 2], bounds [0, 2, 3]
    """
    assert len(lengths) == 0 or 0 < int(lengths.min()) <= int(lengths.max()) <= capacity
    order = permutation(seed, 0, len(lengths), "pack")
    packs: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(order), look_ahead):
        window = np.concatenate([np.array(carried, dtype=np.int64), order[start : start + look_ahead]])
        made = _best_fit_decreasing(window, lengths[window], capacity)
        if start + look_ahead < len(order):
            emptiest = min(range(len(made)), key=lambda number: int(lengths[made[number]].sum()))
            carried = made.pop(emptiest)
        packs += made
    members = np.fromiter(chain.from_iterable(packs), dtype=np.int64, count=len(lengths))
    bounds = np.zeros(len(packs) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in packs], out=bounds[1:])
    return members, bounds


def _best_fit_decreasing(
    numbers: npt.NDArray[np.int64], lengths: npt.NDArray[np.integer], capacity: int
) -> list[list[int]]:
    """The numbers, laid into packs; `lengths` go with them."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    packs: list[list[int]] = []
    with_space: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for number, length in zip(numbers[order].tolist(), lengths[order].tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            one = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, one = capacity, []
            packs.append(one)
        one.append(number)
        if space > length:
            with_space[space - length].append(one)
            spaces |= 1 << (space - length)
    return packs
