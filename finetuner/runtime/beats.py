"""What the ranks of a run say of themselves, and what follows from it: does one hang, has one gone, and which?

- Between steps a hang is a step that takes longer than `limit` and than ten times the longest one so far.
- Elsewhere (data, model, the first step with its compilation, validation, saving, answers) nothing is known of how long
  it may take: a hang is there only if in no rank any thread has moved by one instruction for three times `limit`.
- Suspected is the rank that is behind in steps; among equals one that does not wait for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SILENT = 20.0
"""Seconds without a beat, in the midst of steps, after which a rank's process is taken for dead."""
STEPS, OVER = "step", "the end"
"""Phases: between one step and the next; past all that the watch looks at. Others have their name from the runner."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What one rank says of itself; times are durations in seconds, as clocks of machines differ."""

    phase: str
    step: int
    """Steps done."""
    age: float
    """Since the step or the phase changed."""
    still: float
    """Since any thread of it was last seen to move."""
    longest: float
    """Of its steps but the first."""
    waits: bool
    """Whether its main thread is in a collective or in a backward pass, which may hold one."""
    count: int


def judged(beats: Mapping[int, Beat], silent: Mapping[int, float], limit: float) -> tuple[str, int] | None:
    """("hang" or "silent", the rank that is suspected), or None while all is well.

    `silent` is how long each rank has not beaten.
    """
    running = {number: beat for number, beat in beats.items() if beat.phase != OVER}
    for number, beat in running.items():
        if silent[number] > (SILENT if beat.phase == STEPS else max(SILENT, 3 * limit)):
            return "silent", number
    if not running:
        return None
    behind = min(running, key=lambda number: (running[number].step, running[number].waits, number))
    least = running[behind].step
    last = [beat for beat in running.values() if beat.step == least]
    if least > 0 and all(beat.phase == STEPS for beat in last):
        bound = max(limit, *(10 * beat.longest for beat in running.values()))
        stuck = all(beat.age > bound for beat in running.values())
    else:
        stuck = all(beat.still > 3 * limit for beat in running.values())
    return ("hang", behind) if stuck else None
