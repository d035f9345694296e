"""Which process this is, as the launcher's environment says; no torch.

- torchrun and our own launcher set RANK, WORLD_SIZE and LOCAL_RANK; under `srun` they are taken from SLURM's.
"""

from __future__ import annotations

import os


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
        return int(os.environ[name])
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ and os.environ["SLURM_NTASKS"] != "1":
        return int(os.environ.get(slurm, default))
    return default
