"""Which process this is, as the launcher's environment says; no torch.

- torchrun and our own launcher set RANK, WORLD_SIZE and LOCAL_RANK; under `srun` they are taken from SLURM's.
"""

from __future__ import annotations

import os
import re

from finetuner.errors import Problem, UsageError


def rank() -> int:
    """This process's number among all, from 0."""
    return _number("RANK", "SLURM_PROCID")


def world() -> int:
    """How many processes train together."""
    return max(1, _number("WORLD_SIZE", "SLURM_NTASKS", default=1))


def local_rank() -> int:
    """This process's number on its machine: the number of its GPU."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def adopt() -> None:
    """Sets torchrun's variables from SLURM's where `srun` started this rank: other packages know only those.

    The first host of the job step is the master; the port follows from the numbers of job and step, so that all ranks
    know it and two steps on one host do not meet. MASTER_ADDR and MASTER_PORT win where they are set.
    """
    if "RANK" in os.environ or not _in_step():
        return
    given = {"RANK": str(rank()), "WORLD_SIZE": str(world()), "LOCAL_RANK": str(local_rank())}
    if tasks := os.environ.get("SLURM_STEP_TASKS_PER_NODE"):
        given["LOCAL_WORLD_SIZE"] = str(tasks_of(tasks)[_counted("SLURM_NODEID")])
    if hosts := os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST"):
        os.environ.setdefault("MASTER_ADDR", first_host(hosts))
    numbers = [_counted(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in os.environ]
    # Below the ports that Linux gives to outgoing connections, 32768 and up.
    os.environ.setdefault("MASTER_PORT", str(15000 + sum(numbers) % 15000))
    os.environ.update(given)


def first_host(hosts: str) -> str:
    """The first host of a SLURM list: "gpu[007-009,12],login" -> "gpu007"; "a[1-2]-b[3-4]" -> "a1-b3"."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_of(tasks: str) -> list[int]:
    """The tasks of each node of a SLURM list: "2(x3),1" -> [2, 2, 2, 1]."""
    counts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in tasks.split(","))
    return [int(found[1]) for found in counts if found for _ in range(int(found[2] or 1))]


def _in_step() -> bool:
    """Whether `srun` started this process as one of several; a batch script's own shell is not one of them."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"


def _number(name: str, slurm: str, default: int = 0) -> int:
    """The launcher's number; SLURM's counts only inside a job step that `srun` started."""
    if name in os.environ:
        return _counted(name)
    if _in_step():
        return _counted(slurm) if slurm in os.environ else default
    return default


def _counted(name: str) -> int:
    """The whole number that the environment holds under `name`."""
    text = os.environ.get(name, "")
    if not text.strip().isdecimal():
        what, remedy = (
            "the environment does not say which rank this is",
            f"unset {name}, or start by --nproc or torchrun",
        )
        raise UsageError(Problem("E-RANKS", what, f"the variable {name}", repr(text), "a whole number", remedy))
    return int(text)
