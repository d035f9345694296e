"""Tensors as they come -> safetensors files of a bounded size and their index; memory stays near one file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetuner.errors import ModelError, Problem, UsageError
from finetuner.runtime.fault import fault


class Shards:
    """Writes `add`ed tensors into `folder`; `close` names the files."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Takes one tensor, cast to `dtype` if it is of floating point.

        Raises: ModelError where it is empty, or not finite after the cast.
        """
        if tensor.numel() == 0:
            raise ModelError(Problem("E-EXPORT-EMPTY", f"{name} is empty", found=f"shape {list(tensor.shape)}",
                                     remedy="fetch the base again"))  # fmt: skip
        cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
            source = tensor.float()
            found, remedy = "NaN or infinity in it already", "give a sound base, or an older checkpoint"
            if bool(torch.isfinite(source).all()):
                found = f"a value of {float(source.abs().max()):.4g}, more than {torch.finfo(dtype).max:.4g}"
                remedy = "leave --dtype out, or give bfloat16"
            raise ModelError(Problem("E-EXPORT-NONFINITE", f"{name} is not finite in {dtype}", name, found,
                                     "finite numbers", remedy))  # fmt: skip
        size = cast.numel() * cast.element_size()
        if self._waiting and sum(t.numel() * t.element_size() for t in self._waiting.values()) + size > self._limit:
            self._flush()
        self._waiting[name] = cast.contiguous()
        self.total += size

    def close(self) -> None:
        """Writes the last file and, where there are several, the index."""
        self._flush()
        count = len(self._files)
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            (self._folder / f"part-{number}").rename(self._folder / name)
        if count > 1:
            places = {tensor: name for tensors, name in zip(self._files, names, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        fault("open")
        save_file(self._waiting, self._folder / f"part-{len(self._files)}", metadata={"format": "pt"})
        fault("write")
        self._files.append(list(self._waiting))
        self._waiting = {}


def size_of(text: str) -> int:
    """Bytes: "5GB" -> 5000000000.

    Raises: UsageError.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMG]?)B?", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(Problem("E-SIZE", "not a size", "--max-shard", text, "5GB, 500MB", "--max-shard 5GB"))
    return max(1, int(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]]))
