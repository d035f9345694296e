"""Rows of JSON: an array, one object a line, or objects one after another; which of them is seen in the file.

- One a line: a wrong line is one bad row, and reading goes on at the next line.
- An array or objects over several lines: after a wrong place nobody knows where the next row begins, so the file is
  refused there; a row that is well formed but not usable (null, NaN inside) is one bad row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, Literal

from finetuner.runtime.files import MOST, BadRow, Found
from finetuner.runtime.json_value import DEEPEST, LAX, STRICT, NotFinite, checked, head, is_cut, tail, worded
from finetuner.runtime.json_window import BLOCK, Window


def json_rows(name: str, file: BinaryIO) -> Iterator[Found]:
    """The rows of an opened file, from its start on."""
    first = file.read(BLOCK)
    bom = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    file.seek(bom)
    match layout(first[bom:]):
        case "lines":
            return _lines(name, file)
        case "array":
            return _array(name, Window(name, file))
        case "objects":
            return _objects(Window(name, file))


def layout(block: bytes) -> Literal["lines", "array", "objects"]:
    """How rows follow each other, judged by the first lines that are not blank."""
    lines = [line for line in block.splitlines() if line.strip()][:2]
    if not lines:
        return "lines"
    first, rest = lines[0], lines[1:]
    whole = _state(first)
    if first.lstrip().startswith(b"["):
        return "lines" if whole == "whole" and rest else "array"
    if first.lstrip().startswith(b"{") and whole == "cut":
        restarts = bool(rest) and rest[0].startswith(b"{") and _state(rest[0]) == "whole"
        opened = first.rstrip().endswith((b"{", b"[", b",", b":"))
        return "lines" if restarts and not opened else "objects"
    return "lines"


def _state(line: bytes) -> Literal["whole", "cut", "wrong"]:
    """Whether a line begins with a value that ends in it."""
    text = line.decode(errors="replace").strip()
    try:
        LAX.raw_decode(text)
    except json.JSONDecodeError as error:
        return "cut" if is_cut(error, text) else "wrong"
    except (RecursionError, ValueError):
        return "wrong"
    return "whole"


def _lines(name: str, file: BinaryIO) -> Iterator[Found]:
    number = 0
    while line := file.readline(MOST + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > MOST:
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST)
            yield BadRow(place, "size", "a row is too large", f"more than {MOST:,} bytes", f"at most {MOST:,} bytes")
        elif line.strip():
            yield _row_of_line(place, line)


def _row_of_line(place: str, line: bytes) -> Found:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        return BadRow(place, "utf-8", "a line is not UTF-8", found, "UTF-8 text")
    try:
        start = len(text) - len(text.lstrip())
        value, end = STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n") and is_cut(error, text):
            return BadRow(place, "cut", "the file ends within this row", tail(text), "a whole JSON object")
        return BadRow(f"{place}:{error.colno}", "json", *worded(error))
    except NotFinite as error:
        return BadRow(place, "not-finite", "a number is not finite", str(error), "a finite number, or null")
    except RecursionError:
        return BadRow(place, "depth", "a row is nested too deeply", fits=f"at most {DEEPEST} levels")
    except ValueError as error:
        return BadRow(place, "json", "a line cannot be read as JSON", head(str(error)))
    if rest := text[end:].strip():
        kind = "two-rows" if rest.startswith(("{", "[")) else "json"
        column = end + 1 + len(text[end:]) - len(text[end:].lstrip())
        return BadRow(f"{place}:{column}", kind, "something follows the object on its line", head(rest), "one a line")
    return checked(place, value, text)


def _array(name: str, window: Window) -> Iterator[Found]:
    window.skip("[")
    row, last = 0, 0
    closed = window.peek() == "]"
    while not closed:
        row += 1
        window.peek()
        line = window.line
        place = f"{name}:{line}" if line != last else f"{name}:{line} (row {row})"
        last = line
        yield window.row(place)
        closed = window.peek() == "]"
        if not closed:
            window.skip(",")
    window.skip("]")
    if window.peek():
        raise window.refusal("E-DATA-JSON", "something follows the array", head(window.rest), "nothing")


def _objects(window: Window) -> Iterator[Found]:
    while window.peek():
        yield window.row(f"{window.name}:{window.line}")
