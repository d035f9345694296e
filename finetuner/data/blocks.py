"""`lay`: documents end to end in blocks of `length` tokens; none is lost, none comes twice.

lengths (5, 2, 4), block 4, in that order:  [a a a a] [a b b c] [c c c]
-> pieces (document, start, stop): (0, 0, 4) (0, 4, 5) (1, 0, 2) (2, 0, 1) (2, 1, 4)

- A document that runs over a border is cut there; the piece's last place still predicts the document's next token,
  which lies at the start of the next block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def lay(lengths: npt.NDArray[np.integer], block: int, order: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """(documents, starts, stops, bounds): piece p is tokens `starts[p]:stops[p]` of a document, counted within it;
    block k holds the pieces `bounds[k]:bounds[k + 1]`."""
    ends = np.cumsum(lengths[order], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.arange(block, total + block, block, dtype=np.int64)
    borders[-1:] = total
    cuts = np.union1d(ends, borders)
    begins = np.concatenate([np.zeros(1, np.int64), cuts])[:-1]
    places = np.searchsorted(ends, begins, side="right")
    offsets = ends[places] - lengths[order][places]
    bounds = np.concatenate([np.zeros(1, np.int64), np.searchsorted(cuts, borders, side="right").astype(np.int64)])
    return order[places], begins - offsets, cuts - offsets, bounds
