"""Random numbers as a pure function of where the run stands.

Every micro-batch starts from its own seed, so that dropout needs no saved generator state: a resumed run draws what the
unbroken one drew, and nothing that happens between two steps (an evaluation, an answer) can change what follows.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """One 63-bit seed of several numbers: (seed, step, micro-batch, rank)."""
    text = ",".join(str(number) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(*numbers: int) -> None:
    """Seeds Python, numpy and torch (all devices) from `seed_of(*numbers)`."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
