"""Encoded samples on disk: written once, as a whole or not at all, and memory-mapped by everyone.

tokens.bin int32 (id where learned, ~id where not), offsets.bin int64 [N + 1], learned.bin int32 [N],
rows.bin int64 [N], report.json; MANIFEST.json beside them says that the folder is complete.

- Rows stream through: memory does not grow with their number.
- Chunks go to worker processes when there are many rows, and come back in order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetuner.data.pool import parts_of
from finetuner.data.report import Tally
from finetuner.data.worker import Job
from finetuner.runtime.commit import read_manifest, verify
from finetuner.runtime.files import Found

CHUNK = 512
"""Rows that are encoded at a time."""
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A cache folder, memory-mapped: N samples end to end."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    learned_N: npt.NDArray[np.int32]
    rows_N: npt.NDArray[np.int64]
    report: dict[str, Any]


def open_stored(folder: Path) -> Stored | str:
    """The folder's samples, or why it cannot be used; sizes are looked at, not every byte."""
    wrong = verify(folder, contents=False)
    if wrong is not None:
        return wrong
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tokens, offsets = _mapped(folder / "tokens.bin", np.int32), _mapped(folder / "offsets.bin", np.int64)
    learned_N, rows_N = _mapped(folder / "learned.bin", np.int32), _mapped(folder / "rows.bin", np.int64)
    sizes = (len(offsets) - 1, len(learned_N), len(rows_N), int(offsets[-1]), len(tokens))
    samples, total = report["samples"], report["tokens_kept"]
    if sizes != (samples, samples, samples, total, total):
        return f"its files hold {sizes}, its report says {samples} samples of {total} tokens"
    files = read_manifest(folder)["files"]
    # What was made, not what made it: a new version that encodes alike is the same data to a run that goes on.
    report["samples_sha256"] = [files[name]["sha256"] for name in ("tokens.bin", "offsets.bin")]
    return Stored(tokens, offsets, learned_N, rows_N, report)


def write_samples(folder: Path, job: Job, rows: Iterable[Found], workers: int, progress: Progress | None) -> Tally:
    """Encodes the rows into files of `folder`; the report is the caller's, who judges the tally."""
    tally, end = Tally(), 0
    names = ("tokens.bin", "offsets.bin", "learned.bin", "rows.bin")
    tokens, offsets, learned, numbers = (open(folder / name, "wb", buffering=1 << 20) for name in names)  # noqa: SIM115
    with tokens, offsets, learned, numbers:
        offsets.write(np.zeros(1, np.int64).tobytes())
        for part in parts_of(job, _chunks(rows), workers):
            tokens.write(part.tokens.tobytes())
            offsets.write((end + np.cumsum(part.lengths_N)).tobytes())
            learned.write(part.learned_N.tobytes())
            numbers.write(part.rows_N.tobytes())
            end += len(part.tokens)
            tally.add(part.tally)
            if progress is not None:
                progress(tally.rows_in, None)
    return tally


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _chunks(rows: Iterable[Found]) -> Iterator[tuple[int, list[Found]]]:
    first, rest = 0, iter(rows)
    while chunk := list(islice(rest, CHUNK)):
        yield first, chunk
        first += len(chunk)


def _mapped(path: Path, dtype: type[np.generic]) -> Any:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
