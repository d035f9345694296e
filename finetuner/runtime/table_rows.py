"""Rows of csv, Parquet and plain text files.

- A csv value is always text; a line with another number of values than the header is a bad row.
- Parquet keeps None as None, and is read one row group at a time.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetuner.errors import DataError, Problem
from finetuner.runtime.files import MOST, BadRow, Found, unreadable


def csv_rows(name: str, file: BinaryIO, delimiter: str) -> Iterator[Found]:
    """The rows below the header line, as {column: text}."""
    csv.field_size_limit(MOST)
    # Bytes that are no UTF-8 are kept as surrogates, so that one wrong line does not end the file.
    text = codecs.getreader("utf-8-sig")(file, "surrogateescape")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    columns = _header(name, reader, delimiter)
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(place, "csv", f"this is not csv: {error}", fits="quotes that are closed and doubled within")
            continue
        if values:
            yield _csv_row(place, columns, values)


def _header(name: str, reader: Iterator[list[str]], delimiter: str) -> list[str]:
    columns = next(reader, [])
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled or "" in columns or any(not _is_text(column) for column in columns):
        found = "twice: " + ", ".join(doubled) if doubled else delimiter.join(columns)
        raise DataError(
            Problem(
                "E-DATA-CSV-HEADER",
                "the first line does not name the columns",
                f"{name}:1",
                found,
                "a different name for each column",
                "mend the first line",
            )
        )
    return columns


def _csv_row(place: str, columns: list[str], values: list[str]) -> Found:
    if len(values) != len(columns):
        found, fits = f"{len(values)} values", f"{len(columns)}: {', '.join(columns)}"
        return BadRow(place, "columns", "a line has another number of values than the header", found, fits)
    joined = "".join(values)
    if not _is_text(joined):
        return BadRow(place, "utf-8", "a line is not UTF-8", fits="UTF-8 text")
    if "\0" in joined:
        return BadRow(place, "nul", "a text holds the character NUL", "\\x00", "text without it")
    return place, dict(zip(columns, values, strict=True))


def text_rows(name: str, file: BinaryIO, *, whole: bool) -> Iterator[Found]:
    """{"text": ...} for each line that is not blank, or for the `whole` file."""
    number = 0
    while line := file.read(MOST + 1) if whole else file.readline(MOST + 1):
        number += 1
        place = f"{name}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MOST:
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST)
            yield BadRow(place, "size", "a row is too large", f"more than {MOST:,} bytes", f"at most {MOST:,} bytes")
        elif line.strip():
            yield _text_row(place, line)


def _text_row(place: str, line: bytes) -> Found:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        return BadRow(place, "utf-8", "a text is not UTF-8", found, "UTF-8 text")
    if "\0" in text:
        return BadRow(place, "nul", "a text holds the character NUL", "\\x00", "text without it")
    return place, {"text": text.rstrip("\r\n")}


def parquet_rows(path: Path) -> Iterator[Found]:
    """The rows of a Parquet file, numbered from 1.

    Raises:
        DataError: the file cannot be opened, is not Parquet, or holds no row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty, number = True, 0
    try:
        with pq.ParquetFile(path) as file:
            for block in file.iter_batches(batch_size=1024):
                for row in block.to_pylist():
                    empty, number = False, number + 1
                    yield f"{path}:row {number}", row
    except pa.ArrowException as error:
        problem = Problem(
            "E-DATA-KIND",
            "this is no whole Parquet file",
            str(path),
            str(error).split("\n")[0],
            "Parquet",
            "fetch it again; other files are Json(...), Csv(...), Text(...)",
        )
        raise DataError(problem) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if empty:
        what, fits = "a file of data is empty", "one row or more"
        raise DataError(Problem("E-DATA-EMPTY", what, str(path), "no row", fits, "take it out"))


def _is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: whether no surrogate stands in it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
