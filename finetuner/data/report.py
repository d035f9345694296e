"""`Tally`: every row accounted for, as it becomes data_report.json.

rows_in == rows_kept + the rows of each reason in `dropped`;  tokens_in == tokens_kept + tokens_lost
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuner.errors import DataError, Problem
from finetuner.runtime.files import BadRow

SHOWN = 20
"""Places that are kept of each reason, and bad rows that one error tells."""
KINDS = 5
"""Kinds of bad rows that are told at full length; all are counted."""


@dataclass(slots=True)
class Loss:
    """What was lost for one reason."""

    rows: int = 0
    """Rows of which nothing was kept."""
    samples: int = 0
    places: list[str] = field(default_factory=list)
    """The first places."""

    def add(self, other: Loss) -> None:
        self.rows += other.rows
        self.samples += other.samples
        self.places = (self.places + other.places)[:SHOWN]


@dataclass(slots=True)
class Tally:
    """Counts that grow while rows are read; tallies of chunks add up to that of the whole."""

    rows_in: int = 0
    rows_kept: int = 0
    samples: int = 0
    truncated: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    tokens_learned: int = 0
    """Places with a target."""
    tokens_lost: int = 0
    """Cut off, or of samples that were dropped."""
    think_dropped: int = 0
    """Blocks of thinking that the template leaves out of earlier turns."""
    control_rows: int = 0
    """Rows whose text holds what looks like a control token; it was encoded as plain text."""
    longest: int = 0
    """Tokens of the longest sample, before any cut."""
    too_long: int = 0
    """Samples of more than `length` tokens, whatever became of them."""
    too_long_places: list[str] = field(default_factory=list)
    dropped: dict[str, Loss] = field(default_factory=dict)
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    """The first bad rows."""

    def add_bad(self, bad: BadRow) -> None:
        """Counts a row that cannot be used."""
        self.rows_in += 1
        self.bad_rows += 1
        self.bad = [*self.bad, bad][:SHOWN] if len(self.bad) < SHOWN else self.bad
        self.lose(bad.kind, Loss(rows=1, places=[bad.place]))

    def lose(self, reason: str, loss: Loss) -> None:
        self.dropped.setdefault(reason, Loss()).add(loss)

    def add(self, other: Tally) -> None:
        """Counts a later chunk."""
        self.rows_in += other.rows_in
        self.rows_kept += other.rows_kept
        self.samples += other.samples
        self.truncated += other.truncated
        self.tokens_in += other.tokens_in
        self.tokens_kept += other.tokens_kept
        self.tokens_learned += other.tokens_learned
        self.tokens_lost += other.tokens_lost
        self.think_dropped += other.think_dropped
        self.control_rows += other.control_rows
        self.longest = max(self.longest, other.longest)
        self.too_long += other.too_long
        self.too_long_places = (self.too_long_places + other.too_long_places)[:SHOWN]
        self.bad_rows += other.bad_rows
        self.bad = (self.bad + other.bad)[:SHOWN]
        for reason, loss in other.dropped.items():
            self.lose(reason, loss)

    def as_report(self) -> dict[str, Any]:
        """The counts as JSON data."""
        dropped = {
            reason: {"rows": loss.rows, "samples": loss.samples, "places": loss.places}
            for reason, loss in sorted(self.dropped.items())
        }
        names = ("rows_in", "rows_kept", "samples", "truncated", "tokens_in", "tokens_kept", "tokens_learned")
        more = ("tokens_lost", "think_dropped", "control_rows", "longest")
        return {name: getattr(self, name) for name in names + more} | {"dropped": dropped}


def bad_rows_error(tally: Tally, limit: int | None) -> DataError:
    """Tells the first bad rows by kind, then how many there are of each; `limit` is that of Skip."""
    kinds: dict[str, list[BadRow]] = {}
    for bad in tally.bad:
        kinds.setdefault(bad.kind, []).append(bad)
    counts = sorted(((loss.rows, kind) for kind, loss in tally.dropped.items() if loss.rows), reverse=True)
    found = f"{tally.bad_rows} of {tally.rows_in} rows: " + ", ".join(f"{kind} {count}" for count, kind in counts)
    if limit is None:
        code, what = "E-DATA-ROWS", "rows that cannot be used"
        remedy = f"mend them, or leave them out and have them counted: on_bad_row=Skip({tally.bad_rows})"
    else:
        code, what = "E-DATA-SKIP-LIMIT", f"more than the {limit} bad rows that Skip({limit}) leaves out"
        remedy = f"mend them, or on_bad_row=Skip({tally.bad_rows})"
    shown = [*map(_problem, kinds.values())][:KINDS]
    return DataError(*shown, Problem(code, what, found=found, remedy=remedy))


def _problem(rows: list[BadRow]) -> Problem:
    """The bad rows of one kind; several are told on a line each, with what was found there."""
    first = rows[0]
    if len(rows) == 1:
        where, found = first.place, first.found
    else:
        where = "\n          ".join(f"{row.place}  {row.found}".rstrip() for row in rows)
        found = ""
    return Problem(f"E-ROW-{first.kind.upper()}", first.reason, where, found, first.fits)


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Writes data_report.json into `folder`, as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / "data_report.json", folder / f".tmp_data_report_{os.getpid()}.json"
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
