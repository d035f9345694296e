"""Sizes on a CPU in half precision, rounded up: torch compiles its kernels there for each size, and keeps them all.

A run meets thousands of lengths of documents and numbers of learned places, at about a megabyte each. What fills them
up takes no part in the result.
"""

from __future__ import annotations

import torch

UNIT = 64


def missing(size: int, device: torch.device, dtype: torch.dtype) -> int:
    """What lacks to a size that others have too; 0 on any other device and in float32."""
    return -size % UNIT if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else 0
