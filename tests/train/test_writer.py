"""What is written in the background is waited for, and its errors are never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetuner.engine.checkpoint import latest, linked
from finetuner.train.writer import Writer


def fail():
    raise OSError("disk")


def broken_off(writer):
    writer.begin(fail)
    raise ZeroDivisionError


def test_an_error_is_raised_once_at_the_first_that_asks():
    with Writer() as writer:
        writer.begin(fail)
        with pytest.raises(OSError, match="disk"):
            writer.begin(lambda: None)
        writer.begin(lambda: None)
        writer.wait()
        writer.check()


def test_checking_does_not_wait():
    ready, done = threading.Event(), []
    with Writer() as writer:
        writer.begin(lambda: (ready.wait(10), done.append(1)))
        writer.check()
        assert not done
        ready.set()
    assert done


def test_an_error_at_the_end_leaves_the_block_and_hides_no_other(capsys):
    with pytest.raises(OSError, match="disk"), Writer() as writer:
        writer.begin(fail)
    with pytest.raises(ZeroDivisionError), Writer() as writer:
        broken_off(writer)
    assert "was not written: disk" in capsys.readouterr().err


def test_signals_are_heard_while_it_is_waited_for():
    heard, ended = [], []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
    try:
        with Writer() as writer:
            writer.begin(lambda: (time.sleep(0.6), ended.append(time.monotonic())))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            writer.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard[0] < ended[0] - 0.2


SAVES = """
import sys
from pathlib import Path
from finetuner.engine.checkpoint import link, rotate, write
from finetuner.runtime.commit import sweep
from finetuner.train.writer import Writer
folder = Path(sys.argv[1])
sweep(folder)

def save(step):
    made = write(folder, step, lambda to: (to / "weights").write_text(str(step)), {"run": "mine"})
    link(folder, "last", made)
    rotate(folder, "mine", 1)

with Writer() as writer:
    for step in (9, 10, 11):
        writer.begin(lambda step=step: save(step))
"""


def test_a_crash_anywhere_in_the_background_leaves_one_to_go_on_from(tmp_path: Path) -> None:
    seen: list[str | None] = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", SAVES, str(folder)]
        code = subprocess.run(command, env=os.environ | {"FINETUNER_FAULT": f"*:{number}"}, check=False).returncode
        found, _ = latest(folder, "mine")
        seen.append(found and found.name)
        if found is not None and (folder / "last").is_symlink():
            assert linked(folder, "last") is not None, "last points to nothing"
        if code == 0:
            break
        assert code == 137
    first = next(index for index, name in enumerate(seen) if name)
    assert None not in seen[first:]
    assert list(dict.fromkeys(seen)) == [None, "checkpoint-9", "checkpoint-10", "checkpoint-11"]
