"""Characters carried to tokens, and what a tokenizer writes around a text of its own accord."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from finetuner.dialogue.structure import Span


def learned_tokens(encoding: Encoding, spans: Sequence[Span], trimming: Container[int]) -> npt.NDArray[np.bool_]:
    """True for every token all of whose characters lie in one of `spans`.

    `trimming` are the added tokens that swallow the blanks beside them: their own characters count, the blanks do not.
    Bytes of one character share its place, and are learned together.
    """
    learned_T = np.zeros(len(encoding), dtype=np.bool_)
    for start, stop in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
        if first is None or last is None:
            mark_by_offsets(encoding, start, stop, learned_T)
            continue
        while first <= last and characters(encoding, first)[0] < start:
            first += 1
        end = characters(encoding, last)
        while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == end:
            last += 1
        if end[1] > stop and encoding.ids[last] not in trimming:
            last -= 1
        learned_T[first : last + 1] = True
    return learned_T


def characters(encoding: Encoding, token: int) -> Span:
    """The characters of a token."""
    span: Span | None = encoding.token_to_chars(token)
    assert span is not None, "a token that was found by a character has characters"
    return span


def mark_by_offsets(encoding: Encoding, start: int, stop: int, learned_T: npt.NDArray[np.bool_]) -> None:
    """Marks the tokens of a span whose first or last character belongs to no token (a normalizer took it away)."""
    for number, (begin, end) in enumerate(encoding.offsets):
        if start <= begin < end <= stop:
            learned_T[number] = True


def outer_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's post-processor puts before and after a text: ([bos], [])."""
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    outer = tokenizer.encode("a").ids
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise AssertionError("a post-processor adds tokens around a text and changes none inside")
