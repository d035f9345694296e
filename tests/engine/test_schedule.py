"""The learning rate is a pure function of the step."""

import math

import pytest

from finetuner import WSD, Constant, Cosine, Linear, Steps
from finetuner.engine.schedule import factor, warmup_steps


def curve(schedule, steps):
    return [factor(schedule, step, steps) for step in range(steps)]


def test_linear_is_the_one_of_the_docstring():
    assert curve(Linear(warmup=Steps(2)), 5) == pytest.approx([1 / 2, 1, 3 / 4, 2 / 4, 1 / 4], abs=1e-12)


def test_cosine_equals_the_closed_formula():
    steps, warmup, floor = 50, 5, 0.1
    wanted = [(s + 1) / warmup for s in range(warmup)]
    for s in range(warmup, steps):
        wanted.append(floor + (1 - floor) * (1 + math.cos(math.pi * (s - warmup + 1) / (steps - warmup + 1))) / 2)
    assert curve(Cosine(warmup=0.1, floor=floor), steps) == pytest.approx(wanted, abs=1e-12)


def test_wsd_holds_and_then_falls():
    got = curve(WSD(warmup=0.0, decay=0.4), 10)
    assert got == pytest.approx([1, 1, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5], abs=1e-12)


@pytest.mark.parametrize(
    "schedule", [Constant(), Constant(warmup=0.2), Linear(), Cosine(), WSD(), Cosine(warmup=Steps(999))]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_no_step_is_wasted_and_none_exceeds_the_rate(schedule, steps):
    assert all(0 < value <= 1 for value in curve(schedule, steps))


def test_a_share_of_warmup_is_never_rounded_to_none():
    assert warmup_steps(Cosine(warmup=0.03), 10) == 1
    assert warmup_steps(Cosine(warmup=0.0), 10) == 0
