"""`Samples`: what is trained on, encoded and memory-mapped; `prepare` makes them, once for all ranks and runs.

data -> fingerprint -> is it in the cache?  no: lock, rows -> workers -> folder, commit  -> memory-map

- Nothing of it depends on the number of ranks, workers or machines.
- A `Mix` is no data of its own: it shares the caches of its parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from finetuner.config.data import Data, Dialogues, Documents, Mix
from finetuner.data.batch import IGNORED, Sample
from finetuner.data.cache import Progress, Stored, cores, open_stored, write_samples
from finetuner.data.fingerprint import Fingerprint, fingerprint
from finetuner.data.mix import shares
from finetuner.data.order import permutation
from finetuner.data.report import Tally, bad_rows_error
from finetuner.data.source import files_of, rows_of
from finetuner.data.worker import NO_TARGETS, Job
from finetuner.dialogue.encode import EncoderSpec
from finetuner.dialogue.rows import text
from finetuner.errors import DataError, Problem
from finetuner.runtime.commit import commit_dir, remove_dir
from finetuner.runtime.lock import lock
from finetuner.runtime.log import warn

MOST_WITHOUT_TARGETS = 0.05


@dataclass(frozen=True, slots=True)
class Samples:
    """N samples. Sample i is the tokens `starts[i]:stops[i]`, counted through all `streams`, one after another."""

    streams: tuple[npt.NDArray[np.int32], ...]
    """Memory-mapped tokens: the id where it is learned, ~id where not."""
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    learned: npt.NDArray[np.int32]
    """Places with a target, of each sample."""
    origins: npt.NDArray[np.int64]
    """The row, counted through all parts, that each sample came from."""
    whole: npt.NDArray[np.bool_]
    """False for a document, which may be cut at the border of a block."""
    length: int
    """Tokens of a training row."""
    packed: bool
    report: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return (self.stops - self.starts).astype(np.int32)

    def __getitem__(self, number: int) -> Sample:
        signed_T = self.read(int(self.starts[number]), int(self.stops[number]))
        targets_T = np.full(len(signed_T), IGNORED, np.int32)
        targets_T[:-1] = np.where(signed_T[1:] < 0, IGNORED, signed_T[1:])
        return Sample(np.where(signed_T < 0, ~signed_T, signed_T), targets_T)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The stored tokens of a slice, which lies within one stream."""
        for stream in self.streams:
            if start < len(stream):
                return stream[start:stop]
            start, stop = start - len(stream), stop - len(stream)
        raise IndexError(start)

    def at(self, places_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The stored tokens at these places."""
        if len(self.streams) == 1:
            return self.streams[0][places_T].astype(np.int64)
        bounds = np.cumsum([len(stream) for stream in self.streams])
        stream_T = np.searchsorted(bounds, places_T, side="right")
        signed_T = np.empty(len(places_T), np.int64)
        for number in np.unique(stream_T):
            here_T = stream_T == number
            signed_T[here_T] = self.streams[number][places_T[here_T] - bounds[number] + len(self.streams[number])]
        return signed_T

    def take(self, numbers: npt.NDArray[np.int64]) -> Samples:
        """The samples of these numbers, in this order; the tokens are shared."""
        names = ("starts", "stops", "learned", "origins", "whole")
        return replace(self, **{name: getattr(self, name)[numbers] for name in names})

    def hold_out(self, fraction: float, seed: int) -> tuple[Samples, Samples]:
        """(those to learn, those held out), which depend on `seed` and the number of rows alone.

        Samples of one row stay together: a dialogue cut into several would else be tested on what was learned.

        Raises:
            DataError: E-DATA-HOLD-OUT, fewer than two rows.
        """
        rows, row_of = np.unique(self.origins, return_inverse=True)
        if len(rows) < 2:
            raise DataError(
                Problem(
                    "E-DATA-HOLD-OUT",
                    "too few rows to hold some out",
                    found=str(len(rows)),
                    fits="2 or more",
                    remedy="give Eval(data=...) instead of a fraction",
                )
            )
        count = min(len(rows) - 1, max(1, round(len(rows) * fraction)))
        out = np.zeros(len(rows), np.bool_)
        out[permutation(seed, 0, len(rows), "hold-out")[:count]] = True
        held = out[row_of]
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def prepare(
    data: Data,
    spec: EncoderSpec,
    *,
    cache: Path,
    workers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """The samples of `data`, from the folder `cache` where they lie there, else encoded into it.

    `workers`: processes that encode, by default one a core; `seed`: what a Mix repeats or leaves out.

    Raises:
        DataError: a file cannot be read, rows are wrong or too long, or nothing to learn is left.
    """
    match data:
        case Dialogues() | Documents():
            return _of(data, _stored(data, spec, cache, cores() if workers is None else workers, progress))
        case Mix():
            options: dict[str, Any] = {"cache": cache, "workers": workers, "seed": seed, "progress": progress}
            parts = [prepare(part, spec, **options) for part, _ in data.parts]
            return _mixed(parts, [weight for _, weight in data.parts], seed)
        case _:
            assert_never(data)


def _of(data: Dialogues | Documents, stored: Stored) -> Samples:
    whole = np.full(len(stored.learned_N), isinstance(data, Dialogues))
    packed = data.pack if isinstance(data, Dialogues) else True
    starts, stops = stored.offsets[:-1], stored.offsets[1:]
    learned, origins = stored.learned_N, stored.rows_N
    return Samples((stored.tokens,), starts, stops, learned, origins, whole, data.length, packed, stored.report)


def _mixed(parts: list[Samples], weights: list[float], seed: int) -> Samples:
    taken, report, tokens, rows = [], [], 0, 0
    for part, weight, numbers in zip(parts, weights, shares([len(part) for part in parts], weights, seed), strict=True):
        report.append({"weight": weight, "samples_given": len(numbers), **part.report})
        moved = replace(part, starts=part.starts + tokens, stops=part.stops + tokens, origins=part.origins + rows)
        taken.append(moved.take(numbers))
        tokens += len(part.streams[0])
        rows += part.report["rows_in"]
    names = ("starts", "stops", "learned", "origins", "whole")
    joined = {name: np.concatenate([getattr(part, name) for part in taken]) for name in names}
    streams = tuple(part.streams[0] for part in parts)
    dialogues = [part for part in parts if part.whole.any()]
    packed = all(part.packed for part in dialogues)
    given = {"samples": len(joined["starts"]), "parts": report}
    return Samples(streams=streams, length=parts[0].length, packed=packed, report=given, **joined)


def _stored(
    data: Dialogues | Documents, spec: EncoderSpec, cache: Path, workers: int, progress: Progress | None
) -> Stored:
    """The data's cache folder, made if it is not there or not whole."""
    match data:
        case Dialogues():
            spec = replace(spec, turns=data.turns, system=data.system)
        case Documents():
            spec = replace(spec, template=None)  # a base model's template may be none, or broken
        case _:
            assert_never(data)
    key = fingerprint(data, spec)
    folder = cache / key.digest
    # A folder that is there is whole or damaged, never half written: it is opened without the lock.
    if folder.exists() and isinstance(stored := open_stored(folder), Stored):
        return stored
    with lock(cache / f"{key.digest}.lock", wait=True):
        if folder.exists():
            stored = open_stored(folder)
            if isinstance(stored, Stored):
                return stored
            warn(f"the cache {folder} is damaged ({stored}); it is made again")
            remove_dir(folder)
        # Nobody else is at work on this name: what bears it was left by processes that died.
        for leftover in [*cache.glob(f".tmp_{key.digest}_*"), *cache.glob(f".del_{key.digest}_*")]:
            remove_dir(leftover)
        with commit_dir(folder) as temporary:
            _fill(temporary, data, spec, workers, progress, key)
            key.check_unchanged()
        made = open_stored(folder)
    assert isinstance(made, Stored), made
    return made


def _fill(
    folder: Path,
    data: Dialogues | Documents,
    spec: EncoderSpec,
    workers: int,
    progress: Progress | None,
    key: Fingerprint,
) -> None:
    tally = write_samples(folder, job_of(data, spec), rows_of(data.source), workers, progress)
    _judge(tally, data)
    report = tally.as_report() | {"fingerprint": key.digest, "files": key.files}
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def job_of(data: Dialogues | Documents, spec: EncoderSpec) -> Job:
    """What turns a row of `data` into samples."""
    too_long = data.too_long if isinstance(data, Dialogues) else None
    return Job(spec, data.rows, data.length, too_long, data.replace, placeholders=data.rows is not text)


def _judge(tally: Tally, data: Dialogues | Documents) -> None:
    """Refuses data of which too much is wrong, too long, or without anything to learn."""
    limit = None if data.on_bad_row == "error" else data.on_bad_row.limit
    if tally.bad_rows > (limit or 0):
        raise bad_rows_error(tally, limit)
    where, made = ", ".join(str(path) for path in files_of(data.source)[:3]), tally.samples + tally.too_long
    if isinstance(data, Dialogues) and data.too_long == "error" and tally.too_long:
        raise DataError(
            Problem(
                "E-DATA-TOO-LONG",
                f"samples of more than {data.length} tokens",
                ", ".join(tally.too_long_places[:5]) + (", ..." if tally.too_long > 5 else ""),
                f"{tally.too_long} of {made} samples; the longest has {tally.longest} tokens",
                f"length={tally.longest} or more holds all",
                'length=..., too_long="drop" or too_long="truncate"',
            )
        )
    empty = tally.dropped.get(NO_TARGETS)
    if empty is not None and empty.samples > MOST_WITHOUT_TARGETS * (tally.samples + empty.samples):
        raise DataError(
            Problem(
                "E-DATA-NO-TARGETS",
                "too many samples have nothing to learn once they are cut",
                where,
                f"{empty.samples} of {tally.samples + empty.samples} samples, such as {empty.places[0]}",
                f"at most {MOST_WITHOUT_TARGETS:.0%}",
                f"length={tally.longest} holds all of them whole",
            )
        )
    if not tally.samples:
        dropped = ", ".join(f"{reason} {loss.rows}" for reason, loss in sorted(tally.dropped.items()))
        raise DataError(
            Problem(
                "E-DATA-EMPTY",
                "no sample is left to train on",
                where,
                f"{tally.rows_in} rows; dropped: {dropped}",
                "one sample or more",
                "see what was dropped and why; give a larger length or other rows",
            )
        )
