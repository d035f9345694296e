"""How the process holds memory, set before there is anything to hold; each setting is told.

- CUDA: segments that grow in place, so that memory which is free but in pieces can still be used. torch reads the
  environment once, therefore before torch is imported. Since torch 2.11 the one name serves all devices.
- A CPU with glibc: large blocks that are freed stay with the process; the kernel's fresh pages cost a step time
  (benchmarks/allocator.py).
"""

from __future__ import annotations

import ctypes
import os
import platform

from finetuner.runtime.log import say

NAME, OLD_NAMES = "PYTORCH_ALLOC_CONF", ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"
OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Beginnings of the variables by which a person chooses glibc's settings, or another allocator."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Numbers of malloc.h."""
KEPT = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
"""No block is a mapping of its own; the heap is never given back; it grows by 64 MiB."""


def set_before_torch() -> None:
    """Lets CUDA's segments grow, unless the environment says how torch allocates."""
    if not any(name in os.environ for name in (NAME, *OLD_NAMES)):
        os.environ[NAME] = GROWING


def settle(device: str) -> None:
    """Tells how memory is held on a `device` of this kind; on a CPU with glibc, keeps what was freed."""
    if device == "cuda":
        held = next((f"{name}={os.environ[name]}" for name in (*OLD_NAMES, NAME) if name in os.environ), "torch's own")
        say(f"CUDA memory: {held}")
    elif device == "cpu" and not any(name.startswith(OWN) for name in os.environ) and keep_freed():
        say("memory that is freed stays with the process: glibc maps and trims none (a MALLOC_ variable undoes it)")


def keep_freed() -> bool:
    """Whether this is a glibc, and took all of `KEPT`."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(number, value) for number, value in KEPT]
    return taken == [1] * len(KEPT)
