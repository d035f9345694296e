"""Batches that are made ahead are the feed's own, whichever step is asked for; an error comes at its step."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from finetuner.data.ahead import Ahead


class Counted:
    """A feed of six steps that notes what was asked of it."""

    steps = 6

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.begun = threading.Event()

    def batches(self, step: int) -> list[Any]:
        self.asked.append(step)
        if step == 4:
            raise OSError("the disk is gone")
        self.begun.set()
        return [f"batch of {step}"]


def test_each_step_gets_its_own_batches_in_any_order() -> None:
    with Ahead(Counted(), pinned=False) as ahead:  # type: ignore[arg-type]
        assert [ahead.batches(step) for step in (0, 1, 2, 5, 1, 2)] == [[f"batch of {n}"] for n in (0, 1, 2, 5, 1, 2)]


def test_the_next_step_is_made_before_it_is_asked_for() -> None:
    feed = Counted()
    with Ahead(feed, pinned=False) as ahead:  # type: ignore[arg-type]
        ahead.batches(0)
        feed.begun.clear()
        assert feed.begun.wait(5) or feed.asked == [0, 1]
        assert ahead.batches(1) == ["batch of 1"]
        assert feed.asked.count(1) == 1


def test_an_error_comes_at_its_step_and_not_before() -> None:
    with Ahead(Counted(), pinned=False) as ahead:  # type: ignore[arg-type]
        assert ahead.batches(3) == ["batch of 3"]
        with pytest.raises(OSError, match="disk is gone"):
            ahead.batches(4)


def test_the_thread_ends_with_the_block() -> None:
    before = threading.active_count()
    with Ahead(Counted(), pinned=False) as ahead:  # type: ignore[arg-type]
        ahead.batches(0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
