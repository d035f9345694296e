"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import assert_never

from finetuner.config.run import WSD, Constant, Cosine, Linear, Schedule, Steps


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied with in step `step` of `steps`, counted from 0.

    Warmup climbs in a line and first reaches 1 in its last step; what follows would meet the floor one step after the
    last, so that no step is wasted on a rate of nothing: Linear(warmup=Steps(2)) over 5 steps -> 1/2, 1, 3/4, 2/4, 1/4.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup + 1) / (steps - warmup + 1)
    match schedule:
        case Constant():
            return 1.0
        case Linear(floor=floor):
            return floor + (1 - floor) * (1 - done)
        case Cosine(floor=floor):
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case WSD(floor=floor):
            falling = max(1, round(schedule.decay * steps))
            left = min(1.0, (steps - step) / (falling + 1))
            return floor + (1 - floor) * left
        case _:
            assert_never(schedule)


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps of warmup; a share is rounded up, so that a run with warmup has some."""
    if isinstance(schedule.warmup, Steps):
        return min(schedule.warmup.count, steps)
    return math.ceil(schedule.warmup * steps)
