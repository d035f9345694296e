"""`Window`: a JSON text that is read block by block, so that memory holds one block and one row."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from finetuner.errors import DataError, Problem
from finetuner.runtime.files import MOST, BadRow, Found
from finetuner.runtime.json_value import DEEPEST, LAX, STRICT, NotFinite, checked, comment, is_cut, tail, worded

BLOCK = 1 << 20
"""Bytes that are read at a time, and by which the layout of a file is told."""
BLANK = re.compile(r"[ \t\r\n]*")


class Window:
    """The part of a text file that is in memory, and how far it has been read: `line` counts from 1."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self.line = name, 1
        self._file, self._text, self._at = file, "", 0
        self._before = 0  # characters of the current line that are no longer in memory
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False

    @property
    def rest(self) -> str:
        return self._text[self._at : self._at + 200]

    def peek(self) -> str:
        """The next character that is not blank, where the window stands afterwards; "" at the end of the file."""
        while True:
            blank = BLANK.match(self._text, self._at)
            assert blank is not None
            self._move(blank.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, mark: str) -> None:
        """Steps over `mark`, the next character that is not blank."""
        found = self.peek()
        if found == mark:
            return self._move(self._at + 1)
        if not found:
            raise self.refusal("E-DATA-CUT", "the file ends within its array", "the end of the file", repr(mark))
        raise self.refusal("E-DATA-JSON", *comment(self.rest, f"expected {mark!r}"))

    def row(self, place: str) -> Found:
        """The value that begins where the window stands, as a row."""
        try:
            value, end = self._value(STRICT)
        except NotFinite as error:
            _, end = self._value(LAX)
            self._move(end)
            return BadRow(place, "not-finite", "a number is not finite", str(error), "a finite number, or null")
        text = self._text[self._at : end]
        if len(text) > MOST:
            self._move(end)
            return BadRow(place, "size", "a row is too large", f"{len(text):,} characters", f"at most {MOST:,} bytes")
        self._move(end)
        return checked(place, value, text)

    def refusal(self, code: str, what: str, found: str = "", fits: str = "", at: int | None = None) -> DataError:
        """An error at the place where the window stands, or at `at` in what is in memory."""
        self._move(self._at if at is None else at)
        column = self._at - (self._text.rfind("\n", 0, self._at) + 1) + 1
        column += self._before if "\n" not in self._text[: self._at] else 0
        remedy = "fetch the file again" if code == "E-DATA-CUT" else "mend the file there"
        return DataError(Problem(code, what, f"{self.name}:{self.line}:{column}", found, fits, remedy))

    def _value(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = is_cut(error, self._text)
                if cut and len(self._text) - self._at > MOST:
                    what = "a row is too large"
                    raise self.refusal("E-DATA-SIZE", what, fits=f"at most {MOST:,} bytes") from None
                if cut and self._more():
                    continue
                if cut:
                    what = "the file ends within a row"
                    raise self.refusal("E-DATA-CUT", what, tail(self._text), "a whole object") from None
                raise self.refusal("E-DATA-JSON", *worded(error), at=error.pos) from None
            except RecursionError:
                what = "a row is nested too deeply"
                raise self.refusal("E-DATA-DEPTH", what, fits=f"at most {DEEPEST} levels") from None
            if end < len(self._text) or not self._more():
                return value, end

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        """Reads on, and lets go of what is behind; as much as the unread part, so that a long row costs no square."""
        if self._ended:
            return False
        behind = self._text[: self._at]
        self._before = len(behind) - behind.rfind("\n") - 1 + (0 if "\n" in behind else self._before)
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(BLOCK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            found = f"byte 0x{error.object[error.start]:02x}"
            problem = Problem(
                "E-DATA-UTF8",
                "a file is not UTF-8",
                f"{self.name}:{line}",
                found,
                "UTF-8 text",
                "save the file as UTF-8",
            )
            raise DataError(problem) from None
        return not self._ended
