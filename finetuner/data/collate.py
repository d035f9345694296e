"""`collate`: packs -> the `Batch` that a model is given, one row long.

T: tokens of the row; S: its slices of documents. There is no padding: several packs make a longer row.
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
    slices = [np.arange(packs.bounds[pack], packs.bounds[pack + 1]) for pack in numbers]
    if not slices:
        return _batch(np.zeros(1, np.int64), np.full(1, -1), np.zeros(1, np.int64), (1,), ())
    chosen_S = slices[0] if len(slices) == 1 else np.concatenate(slices)
    starts_S, stops_S, rows_S = packs.starts[chosen_S], packs.stops[chosen_S], packs.rows[chosen_S]
    lengths_S = stops_S - starts_S
    ends_S = np.cumsum(lengths_S)
    positions_T = np.arange(ends_S[-1]) - np.repeat(ends_S - lengths_S, lengths_S)
    signed_T = samples.at(positions_T + np.repeat(starts_S, lengths_S))
    next_T = np.empty_like(signed_T)
    next_T[:-1] = signed_T[1:]
    next_T[ends_S - 1] = -1
    # A document that goes on after its slice lends the token after it, as the last place's target.
    goes_on_S = stops_S < samples.stops[rows_S]
    if goes_on_S.any():
        next_T[ends_S[goes_on_S] - 1] = samples.at(stops_S[goes_on_S])
    return _batch(signed_T, next_T, positions_T, tuple(lengths_S.tolist()), tuple(rows_S.tolist()))


def _batch(signed_T: Ints, next_T: Ints, positions_T: Ints, lengths: tuple[int, ...], rows: tuple[int, ...]) -> Batch:
    """The batch of stored tokens: the id, or ~id, which as a target is none. Takes `next_T` for its own."""
    tokens_T = signed_T ^ (signed_T >> 63)
    no_target_T = next_T < 0
    np.putmask(next_T, no_target_T, IGNORED)
    tokens_1T, targets_1T, positions_1T = (torch.from_numpy(x[None]) for x in (tokens_T, next_T, positions_T))
    learned = len(next_T) - int(np.count_nonzero(no_target_T))
    return Batch(tokens_1T, targets_1T, positions_1T, lengths, rows, learned)
