"""Which weights these are: a print of a model folder, the same for every way of cutting it into shards.

- Of each tensor: name, dtype, shape and three short windows of its bytes. Two fine-tunes of one model differ in them;
  a copy, a move and another shard size do not. It reads a few kilobytes, not the weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from finetuner.errors import ModelError, Problem
from finetuner.model.folder import read_json, shards

RECORD = "finetuner.json"
WINDOW = 64
"""Bytes read at the start, in the middle and at the end of a tensor."""


def base_identity(folder: Path) -> str:
    """sha256 over the tensors' descriptions, in the order of their names.

    Raises: ModelError where the folder holds no weights.
    """
    lines = sorted(line for name in shards(folder) for line in described(folder / name))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def described(file: Path) -> list[str]:
    """One line a tensor of a safetensors file (8 bytes of length, a JSON header, the tensors' bytes)."""
    lines = []
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            places = (start, max(start, (start + stop - WINDOW) // 2), max(start, stop - WINDOW))
            parts = []
            for place in places:
                opened.seek(8 + size + place)
                parts.append(opened.read(min(WINDOW, stop - place)).hex())
            lines.append(f"{name} {entry['dtype']} {entry['shape']} {' '.join(parts)}")
    return lines


def check_base(checkpoint: Path, base: Path) -> None:
    """Refuses a base other than the one that the adapter in `checkpoint` was trained on, where its record says which.

    Raises: ModelError, E-BASE-OTHER.
    """
    record = checkpoint / RECORD
    trained_on = read_json(record).get("base_identity") if record.exists() else None
    if trained_on is None or trained_on == base_identity(base):
        return
    what = "the base's weights are not those that the adapter was trained on"
    found, remedy = f"other values than in {record}", "--base FOLDER, with the model that it was trained on"
    raise ModelError(Problem("E-BASE-OTHER", what, str(base), found, remedy=remedy))
