"""`permutation`: an order of n things as a pure function of (seed, epoch), the same on every machine.

Philox (Salmon et al. 2011) is keyed by both numbers; its raw words are sorted, since numpy promises the words to stay
the same for ever, but not what its `Generator` makes of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Purpose: TypeAlias = Literal["order", "pack", "hold-out", "mix"]
PURPOSES: tuple[Purpose, ...] = ("order", "pack", "hold-out", "mix")


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int, purpose: Purpose = "order") -> npt.NDArray[np.int64]:
    """The numbers 0..n-1 in an order of their own for each seed, epoch and purpose; read-only."""
    mask = 2**64 - 1
    # Arrays, since numpy takes a list of large numbers for floats and rounds them.
    key = np.array([seed & mask, epoch & mask], np.uint64)
    counter = np.array([0, 0, 0, PURPOSES.index(purpose)], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
