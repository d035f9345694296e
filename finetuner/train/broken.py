"""Writes down the rows of a step whose loss or gradient is not finite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuner.data.batch import Batch
from finetuner.errors import Problem
from finetuner.runtime.ranks import rank


def describe_broken(
    folder: Path, tokenizer: Any, step: int, batches: Sequence[Batch], value: float, what: str
) -> Problem:
    """Writes `folder`/bad_step_N.json (samples, lengths and texts of this rank's rows) and words the problem."""
    rows = [
        {"samples": batch.rows, "lengths": batch.lengths, "text": tokenizer.decode(batch.tokens_1T[0])}
        for batch in batches
    ]
    file = folder / f"bad_step_{step + 1}_rank_{rank()}.json"
    file.write_text(json.dumps({"step": step + 1, "value": str(value), "rows": rows}, indent=1), encoding="utf-8")
    return Problem(
        "E-TRAIN-NONFINITE",
        f"{what} is {value} in step {step + 1}; the update was not applied",
        where=str(file),
        found=f"{sum(len(row['samples']) for row in rows)} samples on this rank",
        remedy="look at the rows in that file; a lower optim.lr or a longer warmup mends most; checkpoints are kept",
    )
