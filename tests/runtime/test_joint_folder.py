"""Ranks fill one folder together: it is there with the parts of all of them or not at all, whoever ends or fails when.

Threads stand in for ranks; where a process must be killed, all of them live in a child.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetuner.engine import checkpoint
from finetuner.errors import CheckpointError, Problem
from finetuner.runtime import joint
from finetuner.runtime.commit import commit_dir, sweep, unfinished, verify, write_file

RANKS = (1, 2)


def content(step: int, rank: int) -> bytes:
    return f"step {step}, rank {rank}".encode() * 50


def together(home: Path, step: int, fills=None, token: str = "t"):
    """Has all ranks write `checkpoint-STEP`; gives what each raised."""
    final = home / f"checkpoint-{step}"
    raised: dict[int, BaseException] = {}

    def other(rank: int) -> None:
        def plainly(folder: Path) -> None:
            time.sleep(float(os.environ.get("PART_DELAY", "0")))
            write_file(folder / "state" / f"part-{rank}", content(step, rank))

        fill = (fills or {}).get(rank, plainly)
        try:
            joint.contribute(unfinished(final, os.getpid()), token, rank, [f"state/part-{rank}"], fill)
        except BaseException as error:
            raised[rank] = error

    def own(folder: Path) -> None:
        (folder / "state").mkdir()
        joint.begin(folder, token)
        write_file(folder / "weights", content(step, 0))
        if fills and 0 in fills:
            fills[0](folder)
        joint.collect(folder, token, RANKS)

    threads = [threading.Thread(target=other, args=(rank,)) for rank in RANKS]
    for thread in threads:
        thread.start()
    try:
        checkpoint.link(home, "last", checkpoint.write(home, step, own, {"run": "mine"}))
        checkpoint.rotate(home, "mine", 1)
    except BaseException as error:
        raised[0] = error
    for thread in threads:
        thread.join()
    return raised


def is_whole(path: Path, step: int) -> bool:
    wanted = {"weights": content(step, 0)} | {f"state/part-{rank}": content(step, rank) for rank in RANKS}
    held = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return verify(path) is None and {name: held[name] for name in held if name != "MANIFEST.json"} == wanted


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.iterdir() if path.name.startswith((".tmp", ".del"))]


def test_all_parts_are_in_the_committed_folder_and_no_marker(tmp_path):
    assert together(tmp_path, 1) == {}
    assert is_whole(tmp_path / "checkpoint-1", 1)
    assert not leftovers(tmp_path)


def test_a_slow_rank_is_waited_for_while_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "PATIENCE", 0.5)

    def slowly(folder):
        with (folder / "state" / "part-2").open("wb") as file:
            for number in range(0, len(content(1, 2)), 100):
                file.write(content(1, 2)[number : number + 100])
                file.flush()
                time.sleep(0.1)

    assert together(tmp_path, 1, {2: slowly}) == {}
    assert is_whole(tmp_path / "checkpoint-1", 1)


def failing(error):
    def fill(folder):
        write_file(folder / "state" / "part-1", b"half")
        raise error

    return fill


TOLD = CheckpointError(Problem("E-DISK-FULL", "disk full: need 2 GB, have 1 GB", where="there"))
ERRORS = {
    "told": (TOLD, "E-DISK-FULL"),
    "full": (OSError(28, "No space left on device"), "E-DISK-FULL"),
    "other": (ValueError("what?"), "E-RANKS-WRITE"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_one_rank_cannot_write_the_main_rank_tells_in_the_same_words(kind, tmp_path):
    error, code = ERRORS[kind]
    together(tmp_path, 1)
    raised = together(tmp_path, 2, {1: failing(error)})
    assert raised.keys() == {0, 1}
    assert str(raised[0]) == str(raised[1])
    assert code in str(raised[0])
    assert is_whole(tmp_path / "checkpoint-1", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "last"]


def test_where_the_main_rank_fails_the_others_stop_quietly_and_nothing_is_left(tmp_path, capsys):
    def late(folder):
        time.sleep(0.3)
        write_file(folder / "state" / "part-1", b"late")

    def fails(_):
        time.sleep(0.1)
        raise TOLD

    assert together(tmp_path, 1, {0: fails, 1: late}) == {0: TOLD}
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_died_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "PATIENCE", 0.2)

    def alone():
        with commit_dir(tmp_path / "x") as folder:
            joint.begin(folder, "t")
            joint.collect(folder, "t", RANKS)

    with pytest.raises(CheckpointError, match="nothing of rank 1, rank 2"):
        alone()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_see_the_main_ranks_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "PATIENCE", 0.1)
    with pytest.raises(CheckpointError, match="a disk that all machines share"):
        joint.contribute(tmp_path / "nowhere", "t", 1, [], lambda _: None)


def test_an_older_unfinished_folder_is_not_written_into(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "PATIENCE", 0.1)
    joint.begin(tmp_path, "older")
    with pytest.raises(CheckpointError, match="E-RANKS-WRITE"):
        joint.contribute(tmp_path, "newer", 1, [], lambda _: pytest.fail("it wrote"))


def test_a_part_that_is_not_there_as_it_was_written_is_refused(tmp_path):
    def cut(folder):
        path = folder / "state" / "part-2"
        while not (folder / ".ranks-t" / "rank-2.done").exists():
            time.sleep(0.01)
        path.write_bytes(b"")

    raised = together(tmp_path, 1, {0: cut})
    assert "0 bytes of the" in str(raised[0])
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_joint_folder
from finetuner.runtime import joint
from finetuner.runtime.commit import sweep
home = Path(sys.argv[1])
if "hasty" in sys.argv:
    import shutil
    joint.collect = lambda folder, token, ranks: shutil.rmtree(folder / (".ranks-" + token))
    joint.PATIENCE = 1.0  # the others wait for what is gone
sweep(home)
raised = test_joint_folder.together(home, 2)
sys.exit(str(raised) if raised else 0)
"""


def child(home: Path, *args: str, **environment: str) -> int:
    script = CHILD.format(tests=str(Path(__file__).parent))
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", script, str(home), *args], env=here, capture_output=True).returncode


def sound(home: Path) -> bool:
    """Whether there is a whole checkpoint and `last` points to one."""
    path, _ = checkpoint.latest(home, "mine")
    last = checkpoint.linked(home, "last")
    wholes = [each for each in (path, last) if each is not None and is_whole(each, checkpoint.step_of(each))]
    return len(wholes) == 2


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_each_point_of_any_rank_loses_nothing(stride, tmp_path):
    together(tmp_path / "first", 1)
    number, code = 0, 137
    while code == 137:
        number += stride
        home = tmp_path / "home"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(tmp_path / "first", home, symlinks=True)
        code = child(home, FINETUNER_FAULT=f"*:{number}")
        assert code in (0, 137), number
        assert sound(home), number
        sweep(home)
        assert sound(home), number
        assert not leftovers(home)
        if number % 12 == 0:
            assert child(home) == 0, number
            assert is_whole(home / "last", 2), number
    assert number > 40, "the sweep ended early: the points of the ranks are not passed"


def test_the_sweep_sees_a_main_rank_that_does_not_wait(tmp_path):
    together(tmp_path / "home", 1)
    child(tmp_path / "home", "hasty", PART_DELAY="0.5")
    assert not sound(tmp_path / "home")
