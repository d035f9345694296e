"""kill -9 at any moment loses nothing beyond the last checkpoint, and what follows is bit-equal to the unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import world

from finetuner.runtime.commit import verify

KILLS = 20
"""Of them at least a quarter inside a save, which a fault point makes slow."""
SLOW = ("fsync:0.05", None, "mkdir:0.2")
"""A write that takes long, none, and one that begins long after its copy was taken: the steps go on meanwhile."""


def start(config, **extra):
    command = [sys.executable, "-m", "finetuner", "train", config.name]
    return subprocess.Popen(
        command, cwd=config.parent, env=world.environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def checkpoints(folder):
    return {int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*")}


def wait_for(condition, process, seconds=120.0):
    """Waits until `condition` holds or the process ends."""
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.002)


def killed_run(folder, kills, seed):
    """Runs to the end with `kills` kills on the way; how many of them fell inside a save."""
    draw, inside = random.Random(seed), 0
    config = folder / "config.py"
    for number in range(kills):
        slow = SLOW[number % 3]
        process = start(config, **({"FINETUNER_SLOW": slow} if slow else {}))
        saved = checkpoints(folder)
        saving = lambda: any((folder / "out").glob(".tmp_checkpoint-*"))  # noqa: E731
        if slow == SLOW[0]:
            wait_for(saving, process)
            time.sleep(draw.uniform(0, 0.3))
        else:
            wait_for(lambda: checkpoints(folder) != saved, process)  # noqa: B023
            time.sleep(draw.uniform(0, 0.2))
        inside += saving()
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, output
        assert checkpoints(folder) or not saved, "every checkpoint was lost"
    finished = start(config)
    output = finished.communicate(timeout=300)[0].decode()
    assert finished.returncode == 0, output
    return inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    world.make(folder, until="Steps(60)", every=1)
    return folder


def test_twenty_kills_lose_nothing(folder, tmp_path_factory):
    done = world.finetuner("train", "config.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    wanted = world.losses(folder / "out"), world.weights(folder / "out")
    os.rename(folder / "out", folder / "unbroken")
    inside = killed_run(folder, KILLS, seed=0)
    assert (world.losses(folder / "out"), world.weights(folder / "out")) == wanted
    assert inside >= KILLS // 4, f"only {inside} kills fell inside a save"
    assert not list((folder / "out").glob(".tmp_*")) + list((folder / "out").glob(".del_*"))


KINDS = {
    "full": {"model": ""},
    "qlora": {"model": world.QLORA},
    "unpacked": {"pack": False},
    "pretraining": {"model": "", "data": world.DOCUMENTS},
    "validated": {"more": ", eval=Eval(fraction=0.2, every=Steps(3))"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills_of_each_kind_of_run_lose_nothing(kind, tmp_path):
    world.make(tmp_path, until="Steps(30)", every=1, **KINDS[kind])
    done = world.finetuner("train", "config.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = world.losses(tmp_path / "out"), world.weights(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "unbroken")
    inside = killed_run(tmp_path, 10, seed=1)
    assert (world.losses(tmp_path / "out"), world.weights(tmp_path / "out")) == wanted
    assert inside >= 2, f"only {inside} kills fell inside a save"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_one_step(tmp_path, number, code):
    world.make(tmp_path, until="Steps(100000)", every=100000)
    process = start(tmp_path / "config.py")
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == code, output
    [step] = checkpoints(tmp_path)
    assert world.losses(tmp_path / "out")[-1][0] == step


def test_a_second_signal_ends_at_once_and_harms_no_checkpoint(tmp_path):
    world.make(tmp_path, until="Steps(100000)", every=100000)
    assert world.finetuner("train", "config.py", "until=Steps(2)", cwd=tmp_path).returncode == 0
    process = start(tmp_path / "config.py", FINETUNER_SLOW="fsync:1")
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: len(metrics.read_text().splitlines()) > 4, process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: any((tmp_path / "out").glob(".tmp_checkpoint-*")), process)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 143, output
    assert time.monotonic() - before < 4, "it waited for the write"
    assert checkpoints(tmp_path) == {2}
    assert verify(tmp_path / "out" / "last") is None
