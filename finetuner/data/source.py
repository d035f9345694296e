"""Rows of a source, each with its place; the one file that knows the `datasets` package.

- The hub's local cache comes first; the network is asked only for what is not there, never under HF_HUB_OFFLINE=1.
- Scripts in a data set are never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from finetuner.config.data import Csv, Hub, Json, Parquet, Source, Text
from finetuner.errors import DataError, Problem
from finetuner.runtime.files import Found, find_files, read_rows
from finetuner.runtime.json_rows import json_rows
from finetuner.runtime.table_rows import csv_rows, parquet_rows, text_rows

SUFFIXES: dict[type, tuple[str, ...]] = {
    Json: (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz"),
    Csv: (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    Parquet: (".parquet",),
    Text: (".txt", ".md", ".text", ".txt.gz"),
}


def rows_of(source: Source) -> Iterator[Found]:
    """("file:line", row) for each row of the source, in order; or a `BadRow`.

    Raises:
        DataError: a file or data set is not there or cannot be read at all.
    """
    if isinstance(source, Hub):
        for number, row in enumerate(load_hub(source), 1):
            yield f"{source.name}[{source.split}]:row {number}", row
        return
    for path in files_of(source):
        match source:
            case Json():
                yield from read_rows(path, json_rows)
            case Csv():
                yield from read_rows(path, partial(csv_rows, delimiter=source.delimiter))
            case Parquet():
                yield from parquet_rows(path)
            case Text():
                yield from read_rows(path, partial(text_rows, whole=source.document == "file"))
            case _:
                assert_never(source)


def files_of(source: Source) -> list[Path]:
    """The files that a source reads; for the hub, the Arrow files of its local cache."""
    if isinstance(source, Hub):
        return [Path(file["filename"]) for file in load_hub(source).cache_files]
    return find_files(source.files, SUFFIXES[type(source)])


def load_hub(source: Hub) -> Any:
    """The hub's data set, from the local cache where it lies there.

    Raises:
        DataError: E-DATA-HUB, it is neither in the cache nor on the hub, or it needs a script.
    """
    import datasets
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    options = {"name": source.subset, "split": source.split, "revision": source.revision}
    forced, configured = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = bool(forced or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"))
    failure: Exception | None = None
    for without_network in (True,) if offline else (True, False):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = without_network
        try:
            return datasets.load_dataset(source.name, **options)
        # datasets raises errors of many packages and kinds; whichever it is, the data set is not there.
        except Exception as error:
            failure = error
        finally:
            constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = forced, configured
    raise _not_there(source, offline, failure) from None


def _not_there(source: Hub, offline: bool, failure: Exception | None) -> DataError:
    reason = f"{type(failure).__name__}: {failure}".split("\n")[0][:300]
    if "script" in reason.lower():
        what, remedy = "a data set that needs a script is refused", "export its rows and give Json('rows.jsonl')"
    else:
        what = "a data set of the hub is not there" + (" (HF_HUB_OFFLINE is set)" if offline else "")
        remedy = "download its files and give Json('folder') or Parquet('folder')"
    return DataError(
        Problem(
            "E-DATA-HUB",
            what,
            where=f"Hub({source.name!r}), split {source.split!r}",
            found=reason,
            fits="a data set in the local cache" + ("" if offline else " or on the hub"),
            remedy=remedy,
        )
    )
