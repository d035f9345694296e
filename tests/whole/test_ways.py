"""However the ranks are started they train the same; a rank that dies or hangs is told once and ends them all."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import world

BAD = """

import os
if os.environ.get("RANK") == "1" and (bad := os.environ.get("BAD")):
    import signal, time
    from finetuner.engine.torch_engine import TorchEngine
    step = TorchEngine.step
    def spoilt(self, number, *rest):
        if number == 3:
            match bad:
                case "hang": time.sleep(1000)
                case "error": raise IndexError("made on rank 1")
                case _: os.kill(os.getpid(), getattr(signal, bad))
        return step(self, number, *rest)
    TorchEngine.step = spoilt
"""
"""What a config's own program may do to a rank in the midst of a run."""


def prepared(folder: Path) -> Path:
    world.make(folder, until="Steps(5)", every=4, attention_dropout=0.0, model=", adapter=LoRA(rank=4, alpha=8)")
    with (folder / "config.py").open("a") as file:
        file.write(BAD)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process: its folder, and what was logged."""
    folder = prepared(tmp_path_factory.mktemp("ways"))
    done = world.finetuner("train", "config.py", "folder=alone", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, [[float.fromhex(value) for value in record[1:3]] for record in world.losses(folder / "alone")]


@pytest.fixture
def folder(alone):
    shutil.rmtree(alone[0] / "out", ignore_errors=True)
    return alone[0]


def same(folder: Path, alone) -> bool:
    got = [[float.fromhex(value) for value in record[1:3]] for record in world.losses(folder / "out")]
    return got == [pytest.approx(record, rel=1e-5) for record in alone[1]]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "finetuner", "train", "config.py", "batch.per_device=1", *map(str, words)]


def both(commands, folder: Path, **extra: str) -> list[tuple[int, str]]:
    """(exit code, what was said) of several launchers side by side."""
    started = [
        subprocess.Popen(words, cwd=folder, env=world.environment(**extra), stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    return [(process.returncode, said) for process in started for said in [process.communicate(timeout=200)[1]]]


def nodes(address: str, *words: object) -> list[list[str]]:
    return [command("--nnodes", 2, "--node-rank", rank, "--master-addr", address, *words) for rank in (0, 1)]


def ours(folder: Path) -> list[int]:
    """The processes that work in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.readlink(entry / "cwd") == str(folder.resolve()):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is not ours
    return found


def test_two_nodes_train_what_one_process_does(folder, alone):
    ended = both(nodes(f"127.0.0.1:{free_port()}"), folder)
    assert [code for code, _ in ended] == [0, 0], ended
    assert same(folder, alone)
    assert "step 5/5" in ended[0][1]
    assert "step" not in ended[1][1], "only the main rank speaks"
    assert not ours(folder)


TWO_HOSTS = """
set -e
ip link set lo up
unshare -n sh -c '
    until ip link show ft1 >/dev/null 2>&1; do sleep 0.1; done
    ip addr add 10.77.0.2/24 dev ft1
    ip link set ft1 up
    ip link set lo up
    exec "$@"' sh $NODE1 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link add name ft0 type veth peer name ft1
ip link set ft1 netns $other
ip addr add 10.77.0.1/24 dev ft0
ip link set ft0 up
$NODE0
wait $other
"""


def can_make_hosts() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    probe = "ip link set lo up && ip link add name fta type veth peer name ftb"
    return subprocess.run(["unshare", "-rn", "sh", "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_make_hosts(), reason="network namespaces are not allowed here")
def test_two_hosts_with_a_wire_between_them_train_what_one_process_does(folder, alone):
    first, second = (" ".join(words) for words in nodes("10.77.0.1:29611"))
    env = world.environment(NODE0=first, NODE1=second)
    words = ["unshare", "-rn", "sh", "-c", TWO_HOSTS]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "gloo speaks through ft0" in done.stderr
    assert same(folder, alone)


def test_torchrun_trains_what_one_process_does(folder, alone):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [*torchrun, "--master-port", str(free_port()), str(world.ROOT / "tools" / "train.py"), "config.py"]
    [(code, said)] = both([[*words, "batch.per_device=1"]], folder)
    assert code == 0, said
    assert same(folder, alone)


def test_srun_trains_what_one_process_does(folder, alone):
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    tasks = [
        ["env", f"SLURM_PROCID={rank}", f"SLURM_LOCALID={rank}", *command()] for rank in (0, 1)
    ]  # fmt: skip
    ended = both(tasks, folder, **step)
    assert [code for code, _ in ended] == [0, 0], ended
    assert same(folder, alone)


def test_a_rank_that_hangs_ends_the_group_with_its_stack_and_everybody_elses(folder):
    begin = time.monotonic()
    [(code, said)] = both([command("--nproc", 2, "--hang-limit", 2)], folder, BAD="hang")
    assert code == 5, said
    assert said.count("error[") == 1
    assert "E-RANK-HANG" in said
    assert "rank 1 hangs" in said
    assert "3 steps done" in said
    assert "spoilt" in said, "where it stands"
    logs = [(folder / "out" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "all_reduce" in logs[0]
    assert "in spoilt" in logs[1]
    assert all("most recent call first" in log for log in logs)
    assert time.monotonic() - begin < 90, "the start, three steps, and half a minute"
    assert not ours(folder)


def test_a_rank_that_is_killed_is_told_with_its_signal_and_its_last_words(folder):
    [(code, said)] = both([command("--nproc", 2)], folder, BAD="SIGKILL")
    assert code == 128 + signal.SIGKILL, said
    assert said.count("error[") == 1
    assert all(words in said for words in ("E-RANK-DIED", "rank 1 of 2", "SIGKILL", "of 47,136 parameters train"))
    assert not ours(folder)


def test_on_two_nodes_the_first_failure_is_the_one_that_both_tell(folder):
    (code, said), (own_code, own) = both(nodes(f"127.0.0.1:{free_port()}"), folder, BAD="error")
    assert (code, own_code) == (5, 1), said + own
    assert "E-RANK-LOST" in said
    assert "rank 1 has failed" in said
    assert "made on rank 1" in said
    assert "unexpected error: IndexError: made on rank 1" in own
    log = (folder / "out" / "logs" / "rank-1.log").read_text()
    assert "Traceback" in log
    assert 'raise IndexError("made on rank 1")' in log
    assert not ours(folder)


def test_ranks_do_not_outlive_a_launcher_that_is_killed(folder):
    words = command("--nproc", 2, "until=Steps(100000)", "log.every=Steps(20)")
    launcher = subprocess.Popen(words, cwd=folder, env=world.environment(), stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    while "step 20/" not in (line := launcher.stderr.readline()):
        assert line, "it has ended before its steps"
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 40
    while ours(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ours(folder)
    assert (folder / "out" / "last").exists(), "they saved first"
