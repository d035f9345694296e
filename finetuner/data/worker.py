"""`Encoding`: a chunk of rows -> tokens; runs in worker processes, which import neither torch nor transformers.

row -> `replace` -> row function -> Dialogue -> Encoder -> length -> flat tokens

- A token that is learned is stored as its id, one that is not as ~id: one int32 says both.
- What becomes of a row depends on the row alone, so that any number of workers gives the same bytes.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from finetuner.config.data import RowFunction
from finetuner.config.function import resolve
from finetuner.data.report import Loss, Tally
from finetuner.dialogue.encode import Encoded, EncoderSpec
from finetuner.dialogue.message import Dialogue, Document, RowError
from finetuner.errors import FinetunerError
from finetuner.runtime.files import BadRow, Found
from finetuner.runtime.json_value import strings

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][A-Za-z0-9_.-]*\s*\}\}")
NO_TARGETS = "no-target-after-truncation"


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker needs to know; can be pickled once `rows` is a reference."""

    spec: EncoderSpec
    rows: RowFunction | str
    """The row function, or the reference by which a worker finds it."""
    length: int
    too_long: Literal["error", "drop", "truncate"] | None
    """None for documents, which have no greatest length."""
    replace: tuple[tuple[str, str], ...]
    placeholders: bool
    """Whether {{name}} in a row is refused."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a chunk of rows became: N samples, end to end."""

    tokens: npt.NDArray[np.int32]
    lengths_N: npt.NDArray[np.int64]
    learned_N: npt.NDArray[np.int32]
    """Places with a target, of each sample."""
    rows_N: npt.NDArray[np.int64]
    """Numbers of the rows that the samples came from."""
    tally: Tally


class Encoding:
    """Encodes chunks, each given with the number of its first row."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = job.spec.build()
        self._read = resolve(job.rows) if isinstance(job.rows, str) else job.rows
        # A placeholder that a replacement writes is wanted.
        self._wanted = {mark for _, new in job.replace for mark in PLACEHOLDER.findall(new)}

    def __call__(self, first: int, chunk: Sequence[Found]) -> Part:
        tally = Tally()
        items: list[Dialogue | Document] = []
        origins: list[tuple[int, str]] = []
        for number, found in enumerate(chunk, first):
            read = found if isinstance(found, BadRow) else self._item(*found)
            if isinstance(read, BadRow):
                tally.add_bad(read)
            else:
                items.append(read)
                origins.append((number, found[0] if isinstance(found, tuple) else found.place))
        made = _Made([], [], [])
        for (number, place), result in zip(origins, self._encoder.encode(items), strict=True):
            if isinstance(result, RowError):
                tally.add_bad(_bad(place, result))
            else:
                self._keep(number, place, result, tally, made)
        return made.part(tally)

    def one(self, found: Found) -> list[Encoded] | BadRow:
        """The samples of one row, not cut to the length."""
        if isinstance(found, BadRow):
            return found
        item = self._item(*found)
        if isinstance(item, BadRow):
            return item
        [made] = self._encoder.encode([item])
        return _bad(found[0], made) if isinstance(made, RowError) else made

    def _item(self, place: str, row: Mapping[str, Any]) -> Dialogue | Document | BadRow:
        """What the row function makes of a row."""
        if self._job.replace:
            row = _replaced(row, self._job.replace)
        if self._job.placeholders and (mark := self._placeholder(row)):
            fits = f"replace=(({mark!r}, ...),), to keep it (({mark!r}, {mark!r}),)"
            return BadRow(place, "placeholder", "a placeholder was left in the text", mark, fits)
        try:
            item = self._read(row)
        except RowError as error:
            return _bad(place, error)
        # The function may be the user's: whatever it raises is told as a matter of this row.
        except (Exception, SystemExit) as error:
            found = " ".join(str(error)[:200].split())
            return BadRow(place, "row-function", f"the row function raised {type(error).__name__}", found)
        if self._job.too_long is None and not isinstance(item, Document):
            return BadRow(
                place,
                "not-document",
                "Documents are made of texts",
                type(item).__name__,
                "a row function that gives Document, or Dialogues(...) for conversations",
            )
        if not isinstance(item, Dialogue | Document):
            return BadRow(
                place,
                "row-function",
                "the row function gave no dialogue",
                type(item).__name__,
                "Dialogue(...) or Document(...)",
            )
        return item

    def _placeholder(self, row: Mapping[str, Any]) -> str:
        # Most rows have none, and writing a row down is five times as fast as walking through it.
        if "{{" not in repr(row):
            return ""
        marks = (mark for text in strings(row) if "{{" in text for mark in PLACEHOLDER.findall(text))
        return next((mark for mark in marks if mark not in self._wanted), "")

    def _keep(self, number: int, place: str, samples: list[Encoded], tally: Tally, made: _Made) -> None:
        """Counts a row's samples, and adds to `made` those that are kept."""
        if self._job.too_long is not None and any(not sample.learned[1:].any() for sample in samples):
            tally.add_bad(BadRow(place, "no-target", "nothing in this row is learned", fits="an answer to learn"))
            return
        kept, reason = 0, ""
        for sample in samples:
            lost = self._cut(number, place, sample, tally, made)
            kept += not lost
            reason = reason or lost
        tally.rows_in += 1
        tally.rows_kept += kept > 0
        tally.control_rows += any(sample.control for sample in samples)
        if not kept:
            tally.lose(reason, Loss(rows=1))

    def _cut(self, number: int, place: str, sample: Encoded, tally: Tally, made: _Made) -> str:
        """Adds a sample to `made`, cut to the length where that is wanted; else gives the reason why not."""
        ids, learned, size, length = sample.ids, sample.learned, len(sample.ids), self._job.length
        tally.tokens_in += size
        tally.longest = max(tally.longest, size)
        tally.think_dropped += sample.think_dropped
        if self._job.too_long is not None and size > length:
            tally.too_long += 1
            if len(tally.too_long_places) < 20:
                tally.too_long_places.append(place)
            ids, learned = ids[:length], learned[:length]
            reason = "" if self._job.too_long == "truncate" else "too-long"
            reason = reason or ("" if learned[1:].any() else NO_TARGETS)
            if reason:
                tally.lose(reason, Loss(samples=1, places=[place]))
                tally.tokens_lost += size
                return reason
            tally.truncated += 1
            tally.tokens_lost += size - length
        targets = int(np.count_nonzero(learned[1:]))
        tally.samples += 1
        tally.tokens_kept += len(ids)
        tally.tokens_learned += targets
        made.tokens.append(np.where(learned, ids, ~ids))
        made.learned.append(targets)
        made.rows.append(number)
        return ""


@dataclass(frozen=True, slots=True)
class _Made:
    """Samples as they gather."""

    tokens: list[npt.NDArray[np.int32]]
    learned: list[int]
    rows: list[int]

    def part(self, tally: Tally) -> Part:
        flat = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.int32)
        lengths_N = np.array([len(tokens) for tokens in self.tokens], np.int64)
        learned_N, rows_N = np.array(self.learned, np.int32), np.array(self.rows, np.int64)
        return Part(flat.astype(np.int32), lengths_N, learned_N, rows_N, tally)


def _bad(place: str, error: RowError) -> BadRow:
    return BadRow(place, error.kind, error.reason, error.found, error.fits)


def _replaced(value: Any, pairs: tuple[tuple[str, str], ...]) -> Any:
    """`value` with the words replaced in every text, keys left alone."""
    if isinstance(value, str):
        for old, new in pairs:
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {key: _replaced(inner, pairs) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, pairs) for inner in value]
    return value


def serve(link: Connection, job: Job) -> None:
    """The life of a worker: (number of the first row, chunk) in, `Part` out, until the other end is closed.

    An error that a person can mend is sent as it is; any other ends the process, with its traceback.
    """
    # One process a core: the tokenizer's own threads would only fight over them. Ctrl-C is the parent's to answer.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        encoding = Encoding(job)
        while True:
            first, chunk = link.recv()
            link.send(encoding(first, chunk))
    except FinetunerError as error:
        link.send(error)
    except (EOFError, ConnectionError):
        # The parent is done, or dead: a killed run leaves nobody behind.
        return
