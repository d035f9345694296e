"""`collate`: packs -> the `Batch` that a model is given, one row long.

T: tokens of the row. There is no padding: several packs make a longer row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from finetuner.data.batch import IGNORED, Batch
from finetuner.data.packs import Ints, Packs
from finetuner.data.samples import Samples


def collate(samples: Samples, packs: Packs, numbers: Sequence[int]) -> Batch:
    """The packs of these numbers, one after another; for none, one token that teaches nothing, so that a rank without
    packs takes part in the step all the same."""
    slices = [number for pack in numbers for number in range(packs.bounds[pack], packs.bounds[pack + 1])]
    if not slices:
        return _batch(np.zeros(1, np.int64), np.full(1, IGNORED), np.zeros(1, np.int64), (1,), ())
    starts, stops, rows = (part[slices].tolist() for part in (packs.starts, packs.stops, packs.rows))
    lengths = tuple(stop - start for start, stop in zip(starts, stops))
    signed_T = np.empty(sum(lengths), np.int64)
    next_T = np.full(sum(lengths), -1, np.int64)
    at = 0
    for start, stop, row in zip(starts, stops, rows):
        # A document that goes on after its slice lends the token after it, as the last place's target.
        read = samples.read(start, min(stop + 1, int(samples.stops[row])))
        signed_T[at : at + stop - start] = read[: stop - start]
        next_T[at : at + len(read) - 1] = read[1:]
        at += stop - start
    tokens_T = np.where(signed_T < 0, ~signed_T, signed_T)
    targets_T = np.where(next_T < 0, IGNORED, next_T)
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    return _batch(tokens_T, targets_T, positions_T, lengths, tuple(rows))


def _batch(
    tokens_T: Ints, targets_T: Ints, positions_T: Ints, lengths: tuple[int, ...], rows: tuple[int, ...]
) -> Batch:
    tokens_1T, targets_1T, positions_1T = (torch.from_numpy(x)[None] for x in (tokens_T, targets_T, positions_T))
    return Batch(tokens_1T, targets_1T, positions_1T, lengths, rows, int((targets_T != IGNORED).sum()))
