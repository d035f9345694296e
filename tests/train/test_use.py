"""Figures of a run: tokens, MFU and waiting over the time of training alone."""

from __future__ import annotations

import numpy as np
import pytest

from finetuner.engine.speed import Speed
from finetuner.model.work import Work
from finetuner.train import use as module
from finetuner.train.loop import Figures, Step
from finetuner.train.use import Use


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def step(number: int, waited: float = 0.25) -> Step:
    return Step(number, 1.0, 30, np.array([60, 40]), waited, lambda: Figures(1.0, 1.0))


def made() -> Use:
    return Use(Work(per_token=1000, per_learned=100, layers=()), Speed(1e6, "a test"))


def test_figures_are_of_the_steps_since_the_last_call(clock: list[float]) -> None:
    use = made()
    use.begin()
    use.add(step(1))
    clock[0] += 1.0
    first = use.since_last()
    assert (first["tokens_per_second"], first["mfu"], first["data_wait"]) == (100.0, 0.103, 0.25)
    use.add(step(2))
    use.add(step(3))
    clock[0] += 4.0
    assert use.since_last()["tokens_per_second"] == 50.0
    whole = use.whole()
    assert (whole["steps"], whole["tokens"], whole["learned_tokens"], whole["seconds"]) == (3, 300, 90, 5.0)
    assert whole["tokens_per_second"] == 60.0
    assert whole["mfu_against"] == "1e-06 TFLOP/s (a test)"


def test_a_pause_is_no_time_of_training(clock: list[float]) -> None:
    use = made()
    use.begin()
    use.add(step(1))
    clock[0] += 1.0
    use.pause()
    clock[0] += 50.0
    use.go_on()
    assert use.since_last()["tokens_per_second"] == 100.0
    assert use.whole()["seconds"] == 1.0
