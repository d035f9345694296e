"""The group of processes that train together: start, device, sums over ranks."""

from __future__ import annotations

import atexit
import datetime
import os
import socket
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from finetuner.errors import ConfigError, Problem, UsageError
from finetuner.runtime.log import say
from finetuner.runtime.meeting import REMEDY, interface_towards, meet
from finetuner.runtime.ranks import adopt, local_rank, rank, world

Value = TypeVar("Value")

LONGEST = datetime.timedelta(minutes=30)
"""How long one rank waits in a collective for the others; `watchdog` tells a hang before, and who hangs."""


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this rank; CUDA asked for and not there is an error, never a quiet CPU run."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        # DeepSpeed, which accelerate imports wherever it is installed, else warns that it found no other.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
    """Joins the group that the environment names; nothing to do for one process. It is left at the process's end."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    adopt()
    if rank() >= world():
        what, found = "this rank is not one of the run's", f"RANK={rank()}, WORLD_SIZE={world()}"
        raise UsageError(Problem("E-RANKS", what, "the environment", found, f"RANK below {world()}", REMEDY))
    if world() == 1:
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    store = meet()
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name
        say(f"gloo speaks through {name}, by which {os.environ['MASTER_ADDR']} is reached (GLOO_SOCKET_IFNAME)")
    # Figures and flags are summed on the CPU, gradients where they lie.
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank(),
        world_size=world(),
        timeout=LONGEST,
        device_id=device if on_gpu else None,  # NCCL else guesses it, and connects only at the first collective
    )
    atexit.register(end)


def alone() -> None:
    """Sets the variables of a group of one, for packages that start only where a launcher has set them."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        os.environ.setdefault(name, value)


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


def gathered(value: Value) -> list[Value]:
    """The `value` of each rank, in their order; small and picklable, as it goes through gloo."""
    if not dist.is_initialized():
        return [value]
    values: list[Value] = [value] * world()
    dist.all_gather_object(values, value)
    return values
