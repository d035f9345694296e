"""Numbers of the command line: each reads a text, and tells what would have fitted."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least_one(text: str) -> int:
    """A count.

    Raises: argparse.ArgumentTypeError.
    """
    return int(number(text, "a whole number from 1 to 1e9", lambda value: 1 <= value <= 1e9 and value == int(value)))


def not_negative(text: str) -> float:
    """A temperature."""
    return number(text, "a number from 0 to 10", lambda value: 0 <= value <= 10)


def share(text: str) -> float:
    """A part of one."""
    return number(text, "a number above 0, up to 1", lambda value: 0 < value <= 1)


def number(text: str, fits: str, is_fit: Callable[[float], bool]) -> float:
    """The number that `text` spells."""
    try:
        value = float(text)
        fit = is_fit(value)
    except (ValueError, OverflowError):
        fit = False
    if not fit:
        raise argparse.ArgumentTypeError(f"{text!r} is not {fits}")
    return value
