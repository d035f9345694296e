"""Two processes train what one does; what goes wrong on them is told once and ends both."""

from __future__ import annotations

import os

import pytest
import world


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    world.make(folder, until="Steps(8)", every=4, attention_dropout=0.0, model=", adapter=LoRA(rank=4, alpha=8)")
    done = world.finetuner("train", "config.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def near(got, wanted):
    told = [(step, float.fromhex(loss), float.fromhex(norm), rate) for step, loss, norm, rate in got]
    meant = [(step, float.fromhex(loss), float.fromhex(norm), rate) for step, loss, norm, rate in wanted]
    return told == [pytest.approx(record, rel=1e-5) for record in meant]


def copy(alone, folder):
    world.make(folder, until="Steps(8)", every=4, attention_dropout=0.0, model=", adapter=LoRA(rank=4, alpha=8)")
    return folder


def test_two_ranks_train_what_one_does_and_one_goes_on_from_two(alone, tmp_path):
    folder = copy(alone, tmp_path)
    four = ("until=Steps(4)", "schedule=Constant()")
    done = world.finetuner("train", "config.py", "--nproc", 2, "batch.per_device=1", *four, cwd=folder)
    assert done.returncode == 0, done.stderr
    wanted = world.finetuner("train", "config.py", *four, "folder=one", cwd=folder)
    assert wanted.returncode == 0, wanted.stderr
    assert near(world.losses(folder / "out"), world.losses(folder / "one"))
    assert done.stderr.count("4 steps") == 1, "both ranks speak"
    assert (folder / "out" / "logs" / "rank-1.log").exists()
    for name, ranks in (("out", 1), ("one", 2)):
        more = world.finetuner("train", "config.py", "until=Steps(8)", "schedule=Constant()", f"folder={name}",
                               "batch.per_device=1", "--nproc", ranks, cwd=folder)  # fmt: skip
        assert more.returncode == 0, more.stderr
    assert len(world.losses(folder / "out")) == 8
    assert near(world.losses(folder / "out"), world.losses(folder / "one"))


def test_a_batch_that_two_ranks_cannot_share_is_told(alone, tmp_path):
    folder = copy(alone, tmp_path)
    done = world.finetuner("train", "config.py", "--nproc", 2, "batch.total=3", "batch.per_device=1", cwd=folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error[E-BATCH-DIVIDE]") == 1
    assert "Traceback" not in done.stderr


def test_wrong_data_is_told_once_and_ends_both_ranks(alone, tmp_path):
    folder = copy(alone, tmp_path)
    (folder / "rows.jsonl").write_text('{"messages": []}\n')
    done = world.finetuner("train", "config.py", "--nproc", 2, "batch.per_device=1", cwd=folder)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error[E-DATA-ROWS]") == 1, done.stderr


def test_a_second_run_in_the_same_folder_is_refused(alone, tmp_path):
    import fcntl

    folder = copy(alone, tmp_path)
    held = os.open(folder / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = world.finetuner("train", "config.py", cwd=folder)
    os.close(held)
    assert done.returncode == 2, done.stderr
    assert "E-LOCK" in done.stderr
