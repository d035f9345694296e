"""Where the assistant's turns stand in the text of every dialogue of one shape.

A row's text must be the template's own pieces with the row's texts between them, as they are or as templates strip or
escape them when they copy. Only then are the places of the shape the places of the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

Span = tuple[int, int]
VARIANTS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    lambda text: text.strip("\n"),
    str.rstrip,
    str.lstrip,
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
)
"""What templates do to a text when they copy it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a text of the shape: after `slots` of its texts and `literal` characters of the template's own."""

    slots: int
    literal: int


@dataclass(frozen=True, slots=True)
class Structure:
    """The literal pieces around the texts, and the places of the turns to learn."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    """Which text stands between piece i and piece i + 1."""
    turns: tuple[tuple[Place, Place], ...]
    messages: tuple[int, ...]
    """Their messages."""
    dropped: int
    """Blocks of thinking that the template does not write."""

    def spans(self, text: str, texts: tuple[str, ...]) -> list[Span] | None:
        """The learned characters of `text`, the rendering of `texts`; None if it is not this structure filled in."""
        inner = [texts[number] for number in self.order]
        parts = [piece for pair in zip(self.pieces, inner) for piece in pair]
        if "".join(parts) + self.pieces[-1] != text:
            copied = as_copied(text, self.pieces, inner)
            if copied is None:
                return None
            inner = copied
        before = [0, *accumulate(map(len, inner))]
        return [(a.literal + before[a.slots], b.literal + before[b.slots]) for a, b in self.turns]


def as_copied(text: str, pieces: tuple[str, ...], inner: list[str]) -> list[str] | None:
    """The texts as they stand in `text` between `pieces`, each the result of one of VARIANTS; None if they do not."""
    if not text.startswith(pieces[0]):
        return None
    place, copied = len(pieces[0]), []
    for raw, piece in zip(inner, pieces[1:], strict=True):
        for variant in VARIANTS:
            found = variant(raw)
            if text.startswith(found, place) and text.startswith(piece, place + len(found)):
                break
        else:
            return None
        copied.append(found)
        place += len(found) + len(piece)
    return copied if place == len(text) else None
