"""Token ids as they come -> text as it may be shown: whole characters only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"


class Words(BaseStreamer):  # type: ignore[misc]  # transformers is untyped; `generate` asks for this class
    """Turns the ids that `generate` puts into text, piece by piece, and hands each piece to `show`.

    Bytes of a character that is not finished wait for the rest of it. A piece is what the text of the last tokens
    gains by the new ones, so that a tokenizer that writes a blank before a word, but not before the first, is read
    right. `text` is the pieces together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: tuple[int, ...], show: Callable[[str], None]) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._prompt = True
        self._context = self._shown = 0

    def put(self, value: Any) -> None:
        """Takes the prompt at first, which is not shown, then ids."""
        if self._prompt:
            self._prompt = False
            return
        for number in value.flatten().tolist():
            self.stopped = self.stopped or number in self._stops
            if not self.stopped:
                self.ids.append(number)
                self._advance(last=False)

    def end(self) -> None:
        """Shows what waited, though it may be no whole character."""
        self._advance(last=True)

    def _advance(self, *, last: bool) -> None:
        before = self._decoded(self.ids[self._context : self._shown])
        now = self._decoded(self.ids[self._context :])
        if not last and (len(now) <= len(before) or now.endswith(UNFINISHED)):
            return
        self._context, self._shown = self._shown, len(self.ids)
        piece = now[len(before) :]
        if piece:
            self.text += piece
            self._show(piece)

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
