"""One JSON value as a row: how it is decoded, what in it is refused, how what is wrong is worded.

- Decoding follows the standard: NaN, Infinity, comments, lone surrogates and NUL are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetuner.runtime.files import BadRow, Found

DEEPEST = 100
"""Levels of nesting."""


class NotFinite(ValueError):
    """NaN or an infinity, which JSON does not have."""


def _refuse(name: str) -> Any:
    raise NotFinite(name)


STRICT = json.JSONDecoder(parse_constant=_refuse)
LAX = json.JSONDecoder()


def checked(place: str, value: Any, text: str) -> Found:
    """`value` as a row, unless something in it cannot be used; `text` is how it was written."""
    if not isinstance(value, dict):
        kind = "null-row" if value is None else "not-an-object"
        return BadRow(place, kind, "a row is not an object", _named(value), "an object: {...}")
    if text.count("{") + text.count("[") > DEEPEST and _depth(value) > DEEPEST:
        return BadRow(place, "depth", "a row is nested too deeply", fits=f"at most {DEEPEST} levels")
    if "\\u" in text:
        for string in strings(value):
            if "\0" in string:
                return BadRow(place, "nul", "a text holds the character NUL", "\\u0000", "text without it")
            if not string.isascii() and (lone := next((c for c in string if "\ud800" <= c <= "\udfff"), "")):
                return BadRow(
                    place,
                    "surrogate",
                    "a text holds half a character",
                    f"\\u{ord(lone):04x}",
                    "a pair of surrogates, or the character itself",
                )
    return place, value


def strings(value: Any) -> Iterator[str]:
    """Every text within `value`, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, level = waiting.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, level)
            waiting += [(inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether `text` may be the beginning of something right, so that more of it would mend the error."""
    tail = text[error.pos :].strip()
    literals = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
    within_escape = len(tail) <= 6 and "\\" in text[max(0, error.pos - 2) :]
    begun = len(tail) <= 9 and any(literal.startswith(tail) for literal in literals)
    return error.msg.startswith("Unterminated string") or begun or within_escape


def worded(error: json.JSONDecodeError) -> tuple[str, str, str]:
    """What is wrong, what was found and what fits there."""
    what, found, fits = comment(error.doc[error.pos : error.pos + 200], f"this is not JSON: {error.msg}")
    return what, found, fits


def comment(rest: str, otherwise: str) -> tuple[str, str, str]:
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments", head(rest), "the file without comments"
    return otherwise, head(rest) or "the end", "JSON"


def _named(value: Any) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "an array"}
    return "null" if value is None else f"{kinds[type(value)]}: {head(json.dumps(value))}"


def head(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= 60 else line[:57] + "..."


def tail(text: str) -> str:
    return "..." + text.rstrip()[-40:]
