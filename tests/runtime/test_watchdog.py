"""A hang is told from long work, and the rank that hangs from those that wait for it."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time

import pytest

from finetuner.runtime import beats, watchdog
from finetuner.runtime.beats import Beat, judged

STEP = Beat("step", 7, 1.0, 0.0, 2.0, False, 9)
LATE = dataclasses.replace(STEP, age=100.0, still=100.0)
WAITS = dataclasses.replace(LATE, waits=True)
SAVING = dataclasses.replace(LATE, phase="saving")
FIRST = Beat("the first step", 0, 500.0, 0.0, 0.0, False, 9)

CASES = {
    "all is well": ([STEP, STEP], None),
    "the one that does not wait": ([WAITS, LATE], ("hang", 1)),
    "the one that is behind in steps": ([dataclasses.replace(WAITS, step=6), LATE], ("hang", 0)),
    "one still moves its steps": ([STEP, LATE], None),
    "long steps have been seen": ([dataclasses.replace(LATE, longest=30.0), WAITS], None),
    "one saves, the others wait for it": ([dataclasses.replace(SAVING, still=0.0), WAITS], None),
    "one hangs in saving": ([SAVING, WAITS], ("hang", 0)),
    "the first step compiles": ([FIRST, dataclasses.replace(FIRST, still=500.0)], None),
    "the first step hangs": ([dataclasses.replace(FIRST, still=500.0)] * 2, ("hang", 0)),
    "one has left in order": ([dataclasses.replace(STEP, phase="the end"), LATE], ("hang", 1)),
    "all have left": ([dataclasses.replace(LATE, phase="the end")] * 2, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hang_is_told_from_long_work_and_named(case):
    ranks, wanted = CASES[case]
    assert judged(dict(enumerate(ranks)), dict.fromkeys(range(len(ranks)), 0.0), 10.0) == wanted


def test_a_rank_without_a_beat_has_gone_but_only_in_the_midst_of_steps():
    assert judged({0: STEP, 1: STEP}, {0: 0.0, 1: beats.SILENT + 1}, 10.0) == ("silent", 1)
    reading = dataclasses.replace(STEP, phase="the data")
    assert judged({0: reading, 1: reading}, {0: 0.0, 1: beats.SILENT + 1}, 10.0) is None, "it may hold the GIL for long"


@pytest.mark.parametrize("field", ["age", "waits", "longest", "phase", "step", "still"])
def test_every_field_decides_some_case(field):
    blind = {"age": 100.0, "waits": False, "longest": 0.0, "phase": "step", "step": 7, "still": 100.0}
    wrong = 0
    for ranks, wanted in CASES.values():
        seen = [dataclasses.replace(beat, **{field: blind[field]}) for beat in ranks]
        wrong += judged(dict(enumerate(seen)), dict.fromkeys(range(len(seen)), 0.0), 10.0) != wanted
    assert wrong, f"a judge that does not see {field} judges the same"


def test_steps_count_their_longest_but_neither_the_first_nor_what_lies_between(monkeypatch):
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    watchdog._place.begin()
    step = type("Done", (), {"number": 1})
    now = 50.0  # of compilation
    assert watchdog.stepped(step) is False
    now = 53.0
    watchdog.stepped(step)
    with watchdog.phase("saving"):
        assert watchdog._place.phase == "saving"
        now = 90.0
    now = 91.0
    watchdog.stepped(step)
    assert watchdog._place.longest == 3.0


def test_a_thread_that_waits_stands_still_and_one_that_works_does_not():
    waiting = threading.Event()

    def wait():
        waiting.wait()

    def work():
        number = 0
        while not waiting.is_set():
            number += 1

    threads = [threading.Thread(target=target) for target in (wait, work)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    marks = [[], []]
    for _ in range(20):
        frames = sys._current_frames()
        for thread, seen in zip(threads, marks, strict=True):
            seen.append(watchdog._instructions(frames[thread.ident]))
        time.sleep(0.01)
    waiting.set()
    for thread in threads:
        thread.join()
    assert len(set(marks[0])) == 1
    assert len(set(marks[1])) > 1
