"""Which process this is, as the launcher's environment says; no torch.

- torchrun and our own launcher set RANK, WORLD_SIZE and LOCAL_RANK; under `srun` they are taken from SLURM's.
"""

from __future__ import annotations

import os

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


def _number(name: str, slurm: str, default: int = 0) -> int:
    """The launcher's number; SLURM's counts only inside a job step that `srun` started."""
    if name in os.environ:
        return _counted(name)
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ and os.environ["SLURM_NTASKS"] != "1":
        return _counted(slurm) if slurm in os.environ else default
    return default


def _counted(name: str) -> int:
    """The whole number that the environment holds under `name`."""
    text = os.environ[name]
    if not text.strip().isdecimal():
        what, remedy = (
            "the environment does not say which rank this is",
            f"unset {name}, or start by --nproc or torchrun",
        )
        raise UsageError(Problem("E-RANKS", what, f"the variable {name}", repr(text), "a whole number", remedy))
    return int(text)
