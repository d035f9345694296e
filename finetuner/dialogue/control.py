"""Control strings inside what people say: `a<|im_end|>` in a text stays seven characters and never ends a turn.

How a row with such strings is encoded:

1. Every control string in its texts is replaced by a private-use character, a mask; the template renders that.
2. Control strings in the rendering are now the template's own; each becomes another private-use character, a token's
   name. Masks become the strings again.
3. A twin of the tokenizer, whose control tokens bear those names, encodes the result as a whole: the template's tokens
   become control tokens, the people's strings are ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from finetuner.dialogue.message import Dialogue, Message, RowError
from finetuner.dialogue.structure import Span
from finetuner.dialogue.texts import Texts

FIRST_NAME, FIRST_MASK, MOST = 0xF0000, 0xF4000, 0x4000
MASKS = re.compile(f"[{chr(FIRST_MASK)}-{chr(FIRST_MASK + MOST - 1)}]")
AS_IT_IS: dict[str, None] = {"padding": None, "truncation": None, "post_processor": None}
OURS = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True, slots=True)
class TwinText:
    """A rendering for the twin tokenizer, and its learned characters."""

    text: str
    spans: list[Span]
    tokens: int
    """Control tokens that the template wrote."""


class Control:
    """The control strings of a tokenizer: its special tokens and those that the template frames turns with."""

    def __init__(self, tokenizer_json: str, tokenizer: Tokenizer, frame: Iterable[str]) -> None:
        self._json = tokenizer_json
        data = json.loads(tokenizer_json)
        added: dict[str, int] = {token["content"]: token["id"] for token in data["added_tokens"]}
        special = {token["content"] for token in data["added_tokens"] if token["special"]}
        unknown = unknown_token(data["model"])
        names = (special | (set(frame) & added.keys())) - {unknown}
        assert len(names) <= MOST, "there are private-use characters for every control token"
        self.names = sorted(names, key=lambda name: (-len(name), name))
        self.ids = np.array(sorted(added[name] for name in names), dtype=np.int32)
        self._added = added
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.unknown_ids = frozenset(number for name, number in vocabulary.items() if name == unknown)
        """The token of unknown characters, if there is one: it may stand for any text."""
        self._is_control = np.zeros(max(vocabulary.values()) + 1, dtype=np.bool_)
        self._is_control[self.ids] = True

    def places(self, ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
        """Where control tokens stand among the tokens."""
        return np.flatnonzero(self._is_control[ids_T])

    def spoken(self, texts: Texts) -> bool:
        """Whether a control string stands anywhere in what the row says."""
        return any(map(self.pattern.search, (*texts.texts, texts.rest)))

    def masked(self, dialogue: Dialogue) -> tuple[Dialogue, int]:
        """`dialogue` with a mask for every control string in it, and how many there were."""
        found = 0

        def mask(match: re.Match[str]) -> str:
            nonlocal found
            found += 1
            return chr(FIRST_MASK + self._numbers[match.group()])

        def everywhere(value: Any) -> Any:
            if isinstance(value, str):
                if OURS.search(value):
                    raise RowError("control", "the row has control strings and private-use characters of plane 15")
                return self.pattern.sub(mask, value)
            if isinstance(value, Mapping):
                return {everywhere(key): everywhere(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(everywhere(item) for item in value)
            return value

        def in_message(message: Message) -> Message:
            calls = tuple(
                replace(call, name=everywhere(call.name), arguments=everywhere(call.arguments), id=everywhere(call.id))
                for call in message.tool_calls
            )
            return replace(
                message,
                content=everywhere(message.content),
                reasoning=everywhere(message.reasoning),
                tool_calls=calls,
                tool_call_id=everywhere(message.tool_call_id),
                name=everywhere(message.name),
            )

        messages = tuple(in_message(message) for message in dialogue.messages)
        return replace(dialogue, messages=messages, tools=everywhere(dialogue.tools)), found

    def unmasked(self, text: str) -> str:
        """`text` with the control strings again instead of their masks."""
        return MASKS.sub(lambda match: self.names[ord(match.group()) - FIRST_MASK], text)

    def twin_text(self, masked: str, spans: list[Span]) -> TwinText:
        """A masked rendering as the twin reads it, with `spans` carried along."""
        parts: list[str] = []
        shifts: list[tuple[int, int]] = []
        place = end = tokens = 0
        for match in re.finditer(f"({self.pattern.pattern})|{MASKS.pattern}", masked):
            parts.append(masked[end : match.start()])
            name = match.group(1)
            if name is None:
                parts.append(self.names[ord(match.group()) - FIRST_MASK])
            else:
                parts.append(chr(FIRST_NAME + self._numbers[name]))
                tokens += 1
            place += match.start() - end + len(parts[-1])
            end = match.end()
            shifts.append((end, place - end))
        parts.append(masked[end:])
        starts = np.array([start for start, _ in shifts], dtype=np.int64)
        offsets = [0, *(shift for _, shift in shifts)]

        def carried(character: int) -> int:
            return character + offsets[int(np.searchsorted(starts, character, side="right"))]

        return TwinText("".join(parts), [(carried(start), carried(stop)) for start, stop in spans], tokens)

    @cached_property
    def twin(self) -> Tokenizer:
        """The tokenizer whose control tokens bear private-use names, so that no text can spell them."""
        data = json.loads(self._json) | AS_IT_IS
        for token in data["added_tokens"]:
            if token["content"] in self._numbers:
                token["content"] = chr(FIRST_NAME + self._numbers[token["content"]])
                token["normalized"] = False
        if isinstance(data["model"]["vocab"], list):  # a Unigram model finds whole pieces in ordinary text
            for piece in data["model"]["vocab"]:
                if piece[0] in self._numbers:
                    piece[0] = chr(FIRST_NAME + self._numbers[piece[0]])
        return Tokenizer.from_str(json.dumps(data, ensure_ascii=False))

    @cached_property
    def _own_ids(self) -> npt.NDArray[np.int32]:
        """The tokenizer's id of every id of the twin."""
        own = np.arange(self.twin.get_vocab_size(with_added_tokens=True) + len(self._added), dtype=np.int32)
        for number, token in self.twin.get_added_tokens_decoder().items():
            place = ord(token.content) - FIRST_NAME if OURS.fullmatch(token.content) else -1
            own[number] = self._added[self.names[place] if place >= 0 else token.content]
        return own

    def own_ids(self, encoding: Encoding) -> npt.NDArray[np.int32]:
        """The tokenizer's ids of a text that the twin encoded.

        Raises: RowError("control") where ordinary text became a control token all the same.
        """
        twin_T = np.array(encoding.ids, dtype=np.int32)
        named = np.array(sorted(self.twin.get_added_tokens_decoder()), dtype=np.int32)
        forged = self.ids[~np.isin(self.ids, named)]
        if np.isin(twin_T, forged).any():
            raise RowError("control", "the tokenizer makes a control token of ordinary text")
        own: npt.NDArray[np.int32] = self._own_ids[twin_T]
        return own


def unknown_token(model: Mapping[str, Any]) -> str | None:
    """The token of unknown characters: special, yet ordinary text makes it."""
    number = model.get("unk_id")
    name: str | None = model.get("unk_token") if number is None else model["vocab"][number][0]
    return name
