"""`shares`: which samples each part of a Mix gives to an epoch, by weight.

parts of 10 and 30 samples, weights 1 and 1 -> 20 of the first (each twice), 20 of the second (10 left out)

- An epoch has as many samples as the parts together; what is repeated or left out depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetuner.data.order import permutation


def shares(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[npt.NDArray[np.int64]]:
    """For each part, the numbers of its samples that it gives, sorted; one that is repeated stands there again."""
    counts = _counts(sum(sizes), weights)
    return [_taken(size, count, part, seed) for part, (size, count) in enumerate(zip(sizes, counts, strict=True))]


def _counts(total: int, weights: Sequence[float]) -> list[int]:
    """`total` cut by weight, by largest remainder; a part gives one sample at least."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    for part, count in enumerate(counts):
        if not count:
            counts[part] += 1
            counts[counts.index(max(counts))] -= 1
    return counts


def _taken(size: int, count: int, part: int, seed: int) -> npt.NDArray[np.int64]:
    """All samples as often as they go into `count`, and some once more."""
    times, rest = divmod(count, size)
    once_more = permutation(seed, part, size, "mix")[:rest]
    return np.sort(np.concatenate([np.tile(np.arange(size, dtype=np.int64), times), once_more]))
