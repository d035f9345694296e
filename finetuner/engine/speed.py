"""How fast a device multiplies at best: what MFU, the share of it that training uses, is measured against.

Known GPUs by their makers' figures for dense matrices (NVIDIA's data sheets, tensor cores, no sparsity); any other
device by a short product of its own, measured here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

KNOWN = (
    ("H200", 989.5e12),
    ("GH200", 989.5e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.5e12),
    ("H800", 989.5e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
"""Operations a second in bfloat16 with float32 sums; the first name that stands in the device's counts."""
SIZE, ROUNDS = 1024, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Operations a second, and where the figure comes from."""

    operations: float
    source: str

    def __str__(self) -> str:
        return f"{self.operations / 1e12:.3g} TFLOP/s ({self.source})"


def speed_of(device: torch.device, dtype: torch.dtype) -> Speed:
    """The best speed of `device` in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        found = next((value for part, value in KNOWN if part in name), None)
        if found is not None:
            return Speed(found, f"{name}, dense bfloat16")
    return Speed(measured(device, dtype), f"measured, a product of {SIZE} x {SIZE} matrices")


def measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few products of this device."""
    one = torch.ones(SIZE, SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        product = one @ one
        product[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * SIZE**3 / best
