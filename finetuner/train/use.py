"""`Use`: what a run makes of its devices: tokens a second, MFU, peak memory, the share of time spent waiting for data.

MFU (model FLOPs utilisation, Chowdhery et al. 2022, arXiv:2204.02311): the arithmetic of `model/work.py`, a second and
rank, over the device's best speed. Time that evaluations, saves and answers take is not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from finetuner.engine.speed import Speed
from finetuner.model.work import Work
from finetuner.runtime.ranks import world
from finetuner.train.loop import Step


@dataclass(slots=True)
class Span:
    """What was done in a stretch of time."""

    began: float
    steps: int = 0
    tokens: int = 0
    learned: int = 0
    operations: float = 0.0
    waited: float = 0.0


@dataclass(slots=True)
class Use:
    """Adds up steps; `since_last` gives the figures since it was last asked, `whole` those of the whole run."""

    work: Work
    speed: Speed
    _last: Span = field(default_factory=lambda: Span(0.0))
    _all: Span = field(default_factory=lambda: Span(0.0))
    _paused: float = 0.0

    def begin(self) -> None:
        """The first step begins now."""
        self._last, self._all = Span(time.monotonic()), Span(time.monotonic())

    def add(self, step: Step) -> None:
        operations = self.work.of(step.lengths, step.learned)
        for span in (self._last, self._all):
            span.steps += 1
            span.tokens += step.tokens
            span.learned += step.learned
            span.operations += operations
            span.waited += step.waited

    def pause(self) -> None:
        """What now passes is not training."""
        self._paused = time.monotonic()

    def go_on(self) -> None:
        """Ends a pause."""
        passed = time.monotonic() - self._paused
        self._last.began += passed
        self._all.began += passed

    def since_last(self) -> dict[str, float]:
        """Figures since the last call, for a log line."""
        figures = self._figures(self._last)
        self._last = Span(time.monotonic())
        return figures

    def whole(self) -> dict[str, Any]:
        """Figures from the first step on, for the run's report."""
        span = self._all
        counts = {"steps": span.steps, "tokens": span.tokens, "learned_tokens": span.learned}
        seconds = round(time.monotonic() - span.began, 3)
        return {**counts, "seconds": seconds, **self._figures(span), "mfu_against": str(self.speed)}

    def __str__(self) -> str:
        """One line of the whole run's figures."""
        whole = self.whole()
        rate, mfu = f"{whole['tokens_per_second']:,.0f} tokens/s", f"MFU {whole['mfu']:.1%} of {self.speed}"
        rest = f"peak {whole['memory_gib']:.2f} GiB, {whole['data_wait']:.1%} of the time waiting for data"
        return f"{whole['tokens']:,} tokens: {rate}, {mfu}, {rest}"

    def _figures(self, span: Span) -> dict[str, float]:
        seconds = max(time.monotonic() - span.began, 1e-9)
        return {
            "tokens_per_second": round(span.tokens / seconds, 1),
            "mfu": round(span.operations / seconds / world() / self.speed.operations, 4),
            "memory_gib": round(peak_memory() / 2**30, 3),
            "data_wait": round(span.waited / seconds, 4),
        }


def peak_memory() -> int:
    """Peak bytes: of this rank's GPU, or of the process where it trains on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
