"""What is started where, and which of several failures is told as the cause."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

import pytest

from finetuner.cli import launch, nodes
from finetuner.cli.launch import Failure
from finetuner.errors import UsageError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FINETUNER_TOLD", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def parsed(*words):
    parser = argparse.ArgumentParser()
    nodes.add(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), None),
        (("--nproc", "1"), None),
        (("--nproc", "1", "--nnodes", "1", "--node-rank", "0"), None),
        (("--nproc", "2"), nodes.Nodes(2, 1, 0, "127.0.0.1", None)),
        (("--nproc", "2", "--master-port", "5"), nodes.Nodes(2, 1, 0, "127.0.0.1", 5)),
        (("--nnodes", "2", "--node-rank", "1", "--master-addr", "gpu1"), nodes.Nodes(1, 2, 1, "gpu1", nodes.PORT)),
        (
            ("--nproc", "8", "--nnodes", "2", "--node-rank", "0", "--master-addr", "a:7"),
            nodes.Nodes(8, 2, 0, "a", 7),
        ),
        (
            ("--nnodes", "2", "--node-rank", "0", "--master-addr", "[fe80::1]:7", "--master-port", "7"),
            nodes.Nodes(1, 2, 0, "fe80::1", 7),
        ),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", "fe80::1"), nodes.Nodes(1, 2, 0, "fe80::1", 29500)),
    ],
)
def test_the_arguments_say_which_processes_are_started_here(words, wanted):
    assert nodes.nodes_of(parsed(*words)) == wanted


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--nproc", "0"), "E-NPROC"),
        (("--nnodes", "0"), "E-NODES"),
        (("--nnodes", "2", "--master-addr", "a"), "E-NODES-RANK"),
        (("--nnodes", "2", "--master-addr", "a", "--node-rank", "2"), "E-NODES-RANK"),
        (("--nnodes", "2", "--master-addr", "a", "--node-rank", "-1"), "E-NODES-RANK"),
        (("--node-rank", "1"), "E-NODES-RANK"),
        (("--nnodes", "2", "--node-rank", "0"), "E-NODES-MASTER"),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", "a:b"), "E-NODES-MASTER"),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", "a:70000"), "E-NODES-MASTER"),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", ":7"), "E-NODES-MASTER"),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", ""), "E-NODES-MASTER"),
        (("--nnodes", "2", "--node-rank", "0", "--master-addr", "a:7", "--master-port", "8"), "E-NODES-MASTER"),
        (("--nproc", "2", "--master-port", "0"), "E-NODES-MASTER"),
    ],
)
def test_wrong_combinations_are_told(words, code):
    with pytest.raises(UsageError) as error:
        nodes.nodes_of(parsed(*words))
    assert [problem.code for problem in error.value.problems] == [code]


def test_under_another_launcher_the_ranks_join_and_ours_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert nodes.nodes_of(parsed()) is None
    with pytest.raises(UsageError, match="E-NODES-STARTED"):
        nodes.nodes_of(parsed("--nproc", "2"))
    monkeypatch.setenv("FINETUNER_TOLD", "/tmp")
    assert nodes.nodes_of(parsed("--nproc", "2")) is None, "a rank of ours starts no ranks"


LOST = "error[E-RANK-LOST] another rank"
CASES = [
    ([Failure(0, 5, LOST, 1.0), Failure(1, 3, "error[E-DATA]", 2.0)], 1, "who lost its peers is not the cause"),
    ([Failure(0, 1, "unexpected error", 1.0), Failure(1, -9, "", 2.0)], 1, "a killed rank is the cause"),
    ([Failure(0, 5, LOST, 1.0), Failure(1, 5, LOST, 0.5)], 1, "the first, where all are alike"),
    ([Failure(0, 3, "error[E-A]", 2.0), Failure(1, 3, "error[E-B]", 1.0)], 1, "the first"),
]


@pytest.mark.parametrize(("failures", "rank", "why"), CASES)
def test_the_cause_is_told_and_not_what_followed_from_it(failures, rank, why):
    assert launch.cause_of(failures).rank == rank, why


def test_the_lowest_rank_would_be_the_wrong_cause():
    assert any(min(failures, key=lambda one: one.rank).rank != rank for failures, rank, _ in CASES)


def test_a_rank_that_a_signal_ended_is_told_with_its_last_words(tmp_path):
    log = tmp_path / "rank-1.log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(20)))
    (tmp_path / "rank-1.log").write_text(str(log))
    text = launch.report(Failure(1, -signal.SIGKILL, "", 0.0), tmp_path, 4)
    assert all(word in text for word in ("E-RANK-DIED", "rank 1 of 4", "SIGKILL", "line 19", str(log), "memory"))
    assert "line 14" not in text
    log.write_text("before\nFatal Python error: Segmentation fault\n\nThread 1\n  File x\n" + "module\n" * 50)
    text = launch.report(Failure(1, -signal.SIGSEGV, "", 0.0), tmp_path, 4)
    assert "SIGSEGV" in text
    assert "Fatal Python error" in text
    assert "it had no log" in launch.report(Failure(2, -signal.SIGSEGV, "", 0.0), tmp_path, 4)


def started(code, tmp_path):
    return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)


def test_after_a_failure_the_others_are_ended_with_their_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    stays = (
        "import faulthandler, signal, time; log = open('stacks', 'w');"
        "faulthandler.register(signal.SIGUSR1, file=log); open('ready', 'w'); time.sleep(1000)"
    )
    fails = "import os, sys, time\nwhile not os.path.exists('ready'): time.sleep(0.05)\nsys.exit(3)"
    ranks = {0: started(stays, tmp_path), 1: started(fails, tmp_path)}
    (tmp_path / "rank-1.txt").write_text("error[E-DATA] wrong")
    failures = launch.wait(ranks, tmp_path)
    assert [(one.rank, one.code, one.told) for one in failures] == [(1, 3, "error[E-DATA] wrong")]
    assert ranks[0].returncode == -signal.SIGKILL
    assert "most recent call first" in (tmp_path / "stacks").read_text()


def test_all_that_a_dead_rank_costs_is_half_a_minute():
    assert launch.GRACE + 10 <= 30


def test_a_rank_that_tells_its_end_and_hangs_in_it_is_ended_too(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    ranks = {0: started("import time; time.sleep(1000)", tmp_path)}
    (tmp_path / "rank-0.txt").write_text("error[E-X] wrong")
    assert [(one.rank, one.code) for one in launch.wait(ranks, tmp_path)] == [(0, 5)]
    assert not os.path.exists(f"/proc/{ranks[0].pid}/exe")
