"""Where the turns of a shape stand among its control tokens: the quick way from characters to tokens.

A turn that begins a fixed few tokens behind a control token and ends with one is found by counting control tokens; no
offsets of single tokens are needed, which the tokenizer takes a fifth of its time to keep. Example: the first answer
of `<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nhello<|im_end|>` begins behind the ids of `assistant\\n`
after control token 2, and ends with control token 3. Where other ids stand there (a text that begins with a line end
may join it to the one before), the shortcut does not fit, and the row goes the way of offsets.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from finetuner.dialogue.structure import Structure
from finetuner.dialogue.texts import sentinel


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn: behind control token number `after` and the ids `lead`, up to control token number `end` inclusive."""

    after: int
    lead: tuple[int, ...]
    end: int


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The turns of a shape, and how many control tokens its literal pieces have."""

    controls: int
    turns: tuple[Turn, ...]

    def learned(self, ids_T: npt.NDArray[np.int32], controls: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_] | None:
        """True for the tokens of the turns, given the places of control tokens; None where they are not there."""
        if len(controls) != self.controls:
            return None
        learned_T = np.zeros(len(ids_T), dtype=np.bool_)
        for turn in self.turns:
            before = int(controls[turn.after]) + 1
            start = before + len(turn.lead)
            if tuple(ids_T[before:start].tolist()) != turn.lead:
                return None
            learned_T[start : controls[turn.end] + 1] = True
        return learned_T


def shortcut_of(
    structure: Structure, control: re.Pattern[str], tokenizer: Tokenizer, ambiguous: Container[int]
) -> Shortcut | None:
    """The shortcut of a shape; None where a turn stands otherwise. `ambiguous` ids may stand for any text."""
    text = sentinel(0).join(structure.pieces)
    found = [(match.start(), match.end()) for match in control.finditer(text)]
    turns = []
    for first, last in structure.turns:
        start, stop = first.literal + first.slots, last.literal + last.slots
        after = sum(end <= start for _, end in found) - 1
        ends = [number for number, (_, end) in enumerate(found) if end == stop]
        if after < 0 or not ends or sentinel(0) in text[found[after][1] : start]:
            return None
        lead = tokenizer.encode(text[found[after][0] : start], add_special_tokens=False).ids[1:]
        if any(number in ambiguous for number in lead):
            return None
        turns.append(Turn(after, tuple(lead), ends[0]))
    return Shortcut(len(found), tuple(turns))
