"""An encoder of letters, small enough to be checked by eye, and rows for it; imported by worker processes too.

[user "ab", assistant "c"] -> ids 1 97 98 2 1 99 2, learned are 99 and the 2 behind it;  Document "ab" -> 97 98 3
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from finetuner.dialogue.encode import Encoded
from finetuner.dialogue.message import Dialogue, Document, Message, RowError


@dataclass(frozen=True)
class FakeSpec:
    tokenizer_json: str = "letters"
    template: str = "plain"
    turns: str = "all"
    system: str | None = None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()

    def build(self) -> FakeEncoder:
        return FakeEncoder(self)


class FakeEncoder:
    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec

    def encode(self, items: Sequence[Dialogue | Document]) -> list[list[Encoded] | RowError]:
        return [self._one(item) for item in items]

    def _one(self, item: Dialogue | Document) -> list[Encoded] | RowError:
        if isinstance(item, Document):
            ids = [*map(ord, item.text), 3]
            return [Encoded(np.array(ids, np.int32), np.ones(len(ids), np.bool_))]
        text = "".join(message.content for message in item.messages)
        if "!" in text:
            return RowError("control", "a control token", found="!", fits="no !")
        ids, learned = [], []
        for message in item.messages:
            ids += [1, *map(ord, message.content), 2]
            learned += [False] + [message.is_learned] * (len(message.content) + 1)
        one = Encoded(np.array(ids, np.int32), np.array(learned, np.bool_), text.count("?"), text.count("<"))
        return [one, one] if self.spec.turns == "split" else [one]


def ask(row: Any) -> Dialogue:
    """{"q", "a"} -> a dialogue; a missing answer is the row's fault, a number in it this function's."""
    if "a" not in row:
        raise RowError("missing-field", "a row has no answer", found=", ".join(row), fits="a")
    return Dialogue((Message("user", row["q"]), Message("assistant", row["a"].strip("#"))))
