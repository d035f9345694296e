"""What the loop is fed: samples, and the packed row that they are laid into.

Shapes: T tokens of one packed row. There is no padding: a larger micro-batch is a longer row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The target of a place that is not learned (the index that torch's cross entropy ignores)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens and, for each, the token to predict there: `targets_T[i]` is `tokens_T[i + 1]` or `IGNORED`.

    This is the one shift; nothing after it shifts again. The last target is `IGNORED`.
    """

    tokens_T: npt.NDArray[np.int32]
    targets_T: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row. `lengths` are its documents, which do not see each other: (3, 2) -> positions [0, 1, 2, 0, 1]."""

    tokens_1T: Tensor
    targets_1T: Tensor
    positions_1T: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    """Numbers of the samples in the row, for messages about it."""
    learned: int
    """Places with a target."""
