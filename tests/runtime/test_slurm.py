"""Under `srun` a rank finds its place, its master and its port in SLURM's variables."""

from __future__ import annotations

import os

import pytest

from finetuner.errors import UsageError
from finetuner.runtime import dist, ranks

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch):
    """An environment that holds nothing of any launcher, and is put back."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in NAMES}
    monkeypatch.setattr(os, "environ", dict(bare))
    return os.environ


def test_srun_gives_all_that_torchrun_would(environ):
    environ |= STEP
    ranks.adopt()
    assert [environ[name] for name in NAMES] == ["4", "5", "0", "1", "gpu007", str(15000 + 123458 % 15000)]


def test_all_ranks_of_a_step_agree_on_the_master_and_two_steps_do_not_meet(environ):
    def meeting(**step):
        for name in NAMES:
            environ.pop(name, None)
        environ.update(STEP | step)
        ranks.adopt()
        return environ["MASTER_ADDR"], environ["MASTER_PORT"]

    first = meeting()
    assert meeting(SLURM_PROCID="0", SLURM_NODEID="0") == first
    assert meeting(SLURM_STEP_ID="3") != first


def test_what_is_set_wins_over_slurm(environ):
    environ |= STEP | {"MASTER_ADDR": "other", "MASTER_PORT": "7"}
    ranks.adopt()
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("other", "7")
    environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    ranks.adopt()
    assert (ranks.rank(), ranks.world()) == (1, 2)


@pytest.mark.parametrize("step", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, STEP | {"SLURM_NTASKS": "1"}])
def test_outside_of_a_step_of_several_tasks_a_process_is_alone(environ, step):
    environ |= step
    ranks.adopt()
    assert ranks.world() == 1
    assert "RANK" not in environ


def test_a_step_without_a_number_is_told(environ):
    environ |= STEP | {"SLURM_PROCID": "x"}
    with pytest.raises(UsageError, match="E-RANKS"):
        ranks.adopt()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[12,7-9]", "gpu12"),
        ("a[1-2]-b[3-4]", "a1-b3"),
        ("rack-1-[03]", "rack-1-03"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert ranks.first_host(hosts) == first


def test_tasks_of_each_node():
    assert ranks.tasks_of("2(x3),1") == [2, 2, 2, 1]


def test_alone_sets_what_is_missing_of_a_group_of_one(environ):
    environ["MASTER_ADDR"] = "kept"
    dist.alone()
    assert [environ[name] for name in NAMES[:5]] == ["0", "1", "0", "1", "kept"]
    assert 0 < int(environ["MASTER_PORT"]) < 65536
