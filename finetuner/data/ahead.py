"""`Ahead`: the batches of the next step, made while this one is computed.

- One thread, one step ahead: batches are a pure function of the step, so that they are the feed's own, in any order.
- For a GPU they lie in pinned memory, from where copying does not hold up the host.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
import numpy.typing as npt

from finetuner.data.batch import Batch
from finetuner.data.feed import Feed


class Ahead:
    """A block in which the batches of `feed` are made ahead; `pinned` for a GPU."""

    def __init__(self, feed: Feed, *, pinned: bool) -> None:
        self._feed, self._pinned = feed, pinned
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def steps(self) -> int:
        return self._feed.steps

    def learned(self, step: int) -> int:
        return self._feed.learned(step)

    def lengths(self, step: int) -> npt.NDArray[np.int64]:
        return self._feed.lengths(step)

    def batches(self, step: int) -> list[Batch]:
        """The feed's batches of the step; those of the next one are begun."""
        expected, future = self._next or (None, None)
        batches = future.result() if future is not None and expected == step else self._made(step)
        if step + 1 < self.steps:
            self._next = step + 1, self._thread.submit(self._made, step + 1)
        return batches

    def _made(self, step: int) -> list[Batch]:
        batches = self._feed.batches(step)
        return [pinned(batch) for batch in batches] if self._pinned else batches


def pinned(batch: Batch) -> Batch:
    """`batch` in pinned memory."""
    tensors = (batch.tokens_1T, batch.targets_1T, batch.positions_1T)
    tokens_1T, targets_1T, positions_1T = (tensor.pin_memory() for tensor in tensors)
    return replace(batch, tokens_1T=tokens_1T, targets_1T=targets_1T, positions_1T=positions_1T)
