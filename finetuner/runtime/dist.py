"""The group of processes that train together: start, device, sums over ranks."""

from __future__ import annotations

import datetime
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import DistError, DistNetworkError
from torch.distributed.rendezvous import rendezvous

from finetuner.errors import ConfigError, Problem, UsageError
from finetuner.runtime.log import say
from finetuner.runtime.ranks import local_rank, rank, world

JOIN = datetime.timedelta(seconds=60)
"""How long the processes of a run wait for one another at the start."""


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this rank; CUDA asked for and not there is an error, never a quiet CPU run."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            Problem(
                "E-DEVICE",
                "CUDA is asked for and not there",
                "engine.device",
                "torch sees no CUDA device",
                "'cpu', 'auto'",
                "engine.device=cpu, or install a CUDA build of torch",
            )
        )
    if local_rank() >= torch.cuda.device_count():
        found = f"rank {local_rank()} on a machine with {torch.cuda.device_count()} visible devices"
        raise ConfigError(Problem("E-DEVICE", "more processes than GPUs", "--nproc", found, remedy="lower --nproc"))
    return torch.device("cuda", local_rank())


def start(device: torch.device) -> None:
    """Joins the group that the environment names; nothing to do for one process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world() == 1 or dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if rank() >= world():
        what, found = "this rank is not one of the run's", f"RANK={rank()}, WORLD_SIZE={world()}"
        raise UsageError(Problem("E-RANKS", what, "the environment", found, f"RANK below {world()}", REMEDY))
    # Figures and flags are summed on the CPU, gradients where they lie.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=meet(), rank=rank(), world_size=world(), timeout=datetime.timedelta(minutes=30)
    )


REMEDY = "unset RANK and WORLD_SIZE for one process, or start all of them by --nproc or torchrun"


def meet() -> Any:
    """The store through which all processes of the run found one another.

    Raises:
        UsageError: E-PORT, the port is taken; E-RANKS, not all of them came in time.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    say(f"{world()} processes meet at {place}, within {JOIN.seconds} s")
    try:
        store, _, _ = next(rendezvous("env://", rank(), world(), timeout=JOIN))
        store.set(f"here/{rank()}", "")
        store.wait([f"here/{number}" for number in range(world())], JOIN)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise _alone(place) from error
        what, remedy = "the port at which the processes meet is taken", "give another: MASTER_PORT=29501"
        raise UsageError(
            Problem("E-PORT", what, place, "another program listens there", "a free port", remedy)
        ) from error
    except (DistError, ValueError) as error:
        raise _alone(place) from error
    return store


def _alone(place: str) -> UsageError:
    what, found = "not all processes of the run came", f"RANK={rank()}, WORLD_SIZE={world()}"
    fits = f"{world()} processes within {JOIN.seconds} s"
    return UsageError(Problem("E-RANKS", what, place, found, fits, REMEDY))


def end() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest(value: float) -> float:
    """The largest `value` of any rank: what one wishes, all do."""
    if not dist.is_initialized():
        return value
    held = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)


def same_everywhere(text: str) -> bool:
    """Whether every rank gives the same `text`: ranks that were started with different configs do not."""
    if not dist.is_initialized():
        return True
    texts: list[str | None] = [None] * world()
    dist.all_gather_object(texts, text)
    return len(set(texts)) == 1
