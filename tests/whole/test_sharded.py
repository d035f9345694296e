"""A run whose state lies on two ranks: other ranks and engines go on from it, and a kill loses nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import world
from test_ranks import near

from finetuner.runtime.commit import verify

TWO = ("--nproc", 2, "batch.per_device=1")
ENGINES = {"fsdp": "engine=FSDP()", "zero2": "engine=ZeRO(2)", "zero3": "engine=ZeRO(3)", "torch": "engine=Torch()"}
STEPS = 8


def trained(folder, *args, engine, nproc, until):
    # At a rate at which eight steps do not blow up the last bits by which sums over ranks differ.
    own = ("--nproc", nproc, "batch.per_device=1", ENGINES[engine], f"until=Steps({until})", "schedule=Constant()")
    own = (*own, "optim.lr=1e-3")
    done = world.finetuner("train", "config.py", *own, *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process of plain torch."""
    folder = tmp_path_factory.mktemp("alone")
    world.make(folder, model="", until=f"Steps({STEPS})", every=2, attention_dropout=0.0)
    trained(folder, engine="torch", nproc=1, until=STEPS)
    return folder


WAYS = {
    "fsdp on 2, 1 and 2 ranks": (("fsdp", 2, 2), ("fsdp", 1, 4), ("fsdp", 2, STEPS)),
    "stage 2, stage 3, torch": (("zero2", 2, 2), ("zero3", 2, 4), ("torch", 1, STEPS)),
    "torch, fsdp, stage 2 alone": (("torch", 2, 2), ("fsdp", 2, 4), ("zero2", 1, STEPS)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_by_name_whatever_ranks_and_engine_come_next(way, alone, tmp_path):
    if any(engine.startswith("zero") for engine, _, _ in WAYS[way]):
        pytest.importorskip("deepspeed")
    world.make(tmp_path, model="", until=f"Steps({STEPS})", every=2, attention_dropout=0.0)
    for engine, nproc, until in WAYS[way]:
        trained(tmp_path, engine=engine, nproc=nproc, until=until)
        last = tmp_path / "out" / "last"
        assert verify(last) is None
        is_sharded = nproc > 1 and engine != "torch"
        assert (last / "state" / "state-1-of-2.json").exists() == is_sharded
    assert near(world.losses(tmp_path / "out"), world.losses(alone / "out"))


def newest(folder):
    return max((int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*")), default=0)


def children(parent):
    """Process ids of those whose parent it is; each rank has a session of its own."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry))
    return found


def kill_a_rank(folder, engine, draw, until):
    """Starts two ranks, kills one of them at a random moment near a save, and waits for the launcher's end; whether one
    was there to be killed."""
    command = [sys.executable, "-m", "finetuner", "train", "config.py", *map(str, TWO), ENGINES[engine], until]
    slow = draw.choice(["fsync:0.03", "rename:0.05", ""])
    environment = world.environment(**({"FINETUNER_SLOW": slow} if slow else {}))
    before = newest(folder)
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    limit = time.monotonic() + 120
    saving = lambda: newest(folder) > before or list((folder / "out").glob(".tmp_checkpoint-*"))  # noqa: E731
    while process.poll() is None and not saving() and time.monotonic() < limit:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.4))
    ranks = [pid for pid in children(process.pid) if is_rank(pid)]
    if ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(ranks), signal.SIGKILL)
    said = process.communicate(timeout=90)[1].decode()
    assert (process.returncode != 0) == bool(ranks) or newest(folder) > before, said
    assert newest(folder) >= before, "a checkpoint was lost"
    return bool(ranks)


def is_rank(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0LOCAL_RANK=" in b"\0" + file.read()
    except OSError:
        return False


def outlive(engine, kills, tmp_path):
    """A run of two ranks with `kills` kills in it is, bit for bit, the one without."""
    steps, until = kills + 6, f"until=Steps({kills + 6})"
    world.make(tmp_path, model="", until=f"Steps({steps})", every=1)
    done = world.finetuner("train", "config.py", *TWO, ENGINES[engine], until, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = world.losses(tmp_path / "out"), world.weights(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "unbroken")
    draw = random.Random(engine)
    hits = [kill_a_rank(tmp_path, engine, draw, until) for _ in range(kills)]
    assert any(hits), "no kill has hit"
    done = world.finetuner("train", "config.py", *TWO, ENGINES[engine], until, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (world.losses(tmp_path / "out"), world.weights(tmp_path / "out")) == wanted
    assert not list((tmp_path / "out").glob(".tmp_*")) + list((tmp_path / "out").glob(".del_*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_two_kills_of_a_rank_lose_nothing(engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    outlive(engine, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_twenty_kills_of_a_rank_lose_nothing(engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    outlive(engine, 20, tmp_path)
