"""`Packs`: the rows that training takes, as slices of the samples' tokens; `pack_samples` makes them.

A sample of a dialogue lies whole in one pack. A document may be cut at the border of a block: a slice that does not end
where its document ends predicts, with its last place, the token after it.

- Which slices make a pack depends on (seed, lengths, length) alone; in which order packs are taken is the plan's.
- A pack without anything to learn (the last token of a document, alone in the last block) is left out and counted: its
  token is already the target of the block before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetuner.data.blocks import lay
from finetuner.data.order import permutation
from finetuner.data.pack import LOOK_AHEAD, pack
from finetuner.data.samples import Samples

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing came to."""

    packs: int
    slices: int
    tokens: int
    learned: int
    fill: float
    """Tokens over places: 1.0 leaves no place empty."""
    idle_tokens: int
    """Tokens of packs that were left out since nothing is learned in them."""


@dataclass(frozen=True, slots=True)
class Packs:
    """Pack k is the slices `bounds[k]:bounds[k + 1]`; slice s is the tokens `starts[s]:stops[s]`, of sample `rows[s]`,
    counted as `Samples` counts them."""

    starts: Ints
    stops: Ints
    rows: Ints
    bounds: Ints
    learned: Ints
    """Places with a target, of each pack."""
    report: PackReport

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def lengths(self, pack: int) -> Ints:
        """Tokens of each slice of a pack."""
        slices = slice(self.bounds[pack], self.bounds[pack + 1])
        return self.stops[slices] - self.starts[slices]


@dataclass(frozen=True, slots=True)
class _Slices:
    """Slices of samples, and the learned places of each."""

    starts: Ints
    stops: Ints
    rows: Ints
    learned: Ints

    def take(self, order: Ints) -> _Slices:
        return _Slices(self.starts[order], self.stops[order], self.rows[order], self.learned[order])

    def __add__(self, other: _Slices) -> _Slices:
        pairs = ((self.starts, other.starts), (self.stops, other.stops), (self.rows, other.rows))
        starts, stops, rows = (np.concatenate(pair) for pair in pairs)
        return _Slices(starts, stops, rows, np.concatenate([self.learned, other.learned]))


def pack_samples(samples: Samples, *, seed: int, look_ahead: int = LOOK_AHEAD) -> Packs:
    """Lays the samples into rows of `samples.length` tokens; one sample a row where they are not to be packed."""
    whole = np.flatnonzero(samples.whole)
    dialogues = _Slices(samples.starts[whole], samples.stops[whole], whole, samples.learned[whole].astype(np.int64))
    pieces, bounds = _pieces(samples, np.flatnonzero(~samples.whole), seed)
    if len(whole) == 0:
        return _packs(pieces, bounds, samples.length)
    if samples.packed:
        slices = dialogues + pieces
        members, bounds = pack(slices.stops - slices.starts, samples.length, look_ahead=look_ahead, seed=seed)
        return _packs(slices.take(members), bounds, samples.length)
    single = np.arange(len(whole) + 1, dtype=np.int64)
    return _packs(dialogues + pieces, np.concatenate([single, bounds[1:] + len(whole)]), samples.length)


def _pieces(samples: Samples, numbers: Ints, seed: int) -> tuple[_Slices, Ints]:
    """The documents among the samples, cut into blocks."""
    lengths = samples.lengths[numbers]
    documents, starts, stops, bounds = lay(lengths, samples.length, permutation(seed, 0, len(numbers), "pack"))
    rows = numbers[documents]
    # Only a document's first tokens are nobody's target; place i predicts token i + 1.
    last, unlearned = lengths[documents] - 1, lengths[documents] - 1 - samples.learned[rows]
    learned = np.maximum(0, np.minimum(stops, last) - np.maximum(starts, unlearned))
    begins = samples.starts[rows]
    return _Slices(begins + starts, begins + stops, rows, learned.astype(np.int64)), bounds


def _packs(slices: _Slices, bounds: Ints, length: int) -> Packs:
    """Closes the packs: those that teach nothing are left out, the others counted."""
    sizes = np.add.reduceat(slices.stops - slices.starts, bounds[:-1])
    learned = np.add.reduceat(slices.learned, bounds[:-1])
    keep = learned > 0
    idle = int(sizes[~keep].sum())
    kept = slices.take(np.flatnonzero(np.repeat(keep, np.diff(bounds)))) if idle else slices
    counts = np.diff(bounds)[keep]
    tokens = int(sizes[keep].sum())
    fill = tokens / (len(counts) * length) if len(counts) else 0.0
    report = PackReport(len(counts), int(counts.sum()), tokens, int(learned[keep].sum()), fill, idle)
    closed = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Packs(kept.starts, kept.stops, kept.rows, closed, learned[keep], report)
