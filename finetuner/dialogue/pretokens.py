"""Ids of texts, word by word from memory: a byte-level BPE makes the same ids of a pre-token, wherever it stands.

text -> cut at the added tokens -> pre-tokens, by the tokenizer's own regular expression -> ids, remembered

- New pre-tokens are encoded by the tokenizer itself; of the text, only where to cut it is found here.
- The cuts are proven: each character, when it is first met, is put beside every kind of neighbour, and cut by the
  tokenizer too. A stretch with a character about which the two differ is given to the tokenizer whole, and the first
  text of each batch is encoded both ways.
- Text whose pre-tokens hardly repeat (Chinese, where one is a whole clause) is quicker without: `encode` says so.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
from tokenizers import Tokenizer

BYTE_LEVEL = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""By which `ByteLevel(use_regex=True)` cuts: GPT-2's (Radford et al. 2019)."""
CONTEXTS = "a{0}a {0} 1{0}1\n{0}\r\n!{0}! '{0}a'{0} {0}{0}{0}\t{0}A {0}1  {0}! \n {0}\n"
"""A character among every kind of neighbour."""
HELD = 1 << 26
"""Characters of pre-tokens that are remembered at most."""
TRIAL = 1 << 20
"""Characters after which it is judged whether remembering is worth it."""
WORTH = 0.25
"""Share of characters that may be new in the trial."""


class Pretokens:
    """Encodes texts as `tokenizer` does without special tokens, whose pre-tokens are the matches of `pattern`."""

    def __init__(self, tokenizer: Tokenizer, pattern: regex.Pattern[str], added: Mapping[str, int], nfc: bool) -> None:
        self._tokenizer, self._pattern, self._nfc = tokenizer, pattern, nfc
        names = sorted(added, key=lambda name: (-len(name), name))
        self._border = re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")
        self._always = {name: np.int32(number).tobytes() for name, number in added.items()}
        self._ids = dict(self._always)
        self._held = self._read = self._new = 0
        self._proven: set[str] = set()
        self._doubtful: set[str] = set()
        self._meet({chr(number) for number in range(128)})
        self._odd = re.compile("[" + re.escape("".join(sorted(self._doubtful))) + "]") if self._doubtful else None

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]] | None:
        """The ids of each text; None where the tokenizer alone would be quicker, or right where this is not."""
        if self._held > HELD:
            self._ids, self._held = dict(self._always), 0
        cut = [self._cut(text) for text in texts]
        self._read += sum(map(len, texts))
        new = {word for words in cut for word in words if word not in self._ids}
        if not self._learn(sorted(new)) or (self._read > TRIAL and self._new > WORTH * self._read):
            return None
        of = self._ids.__getitem__
        done = [np.frombuffer(b"".join(map(of, words)), np.int32) for words in cut]
        for text, ids_T in zip(texts[:1], done):
            own = self._tokenizer.encode(text, add_special_tokens=False).ids
            assert ids_T.tolist() == own, f"pre-tokens are cut otherwise than by the tokenizer: {text!r}"
        return done

    def _cut(self, text: str) -> list[str]:
        """Added tokens, pre-tokens, and whole stretches that are the tokenizer's to cut."""
        words: list[str] = []
        for number, part in enumerate(self._border.split(text)):
            if number % 2:
                words.append(part)
            elif self._known(part):
                found = self._pattern.findall(part)
                words += found if "".join(found) == part else [part]
            else:
                words.append(part)
        return words

    def _known(self, part: str) -> bool:
        """Whether the pattern cuts `part` as the tokenizer does."""
        if part.isascii():
            return self._odd is None or not self._odd.search(part)
        characters = set(part)
        if not characters <= self._proven:
            self._meet(characters - self._proven - self._doubtful)
        return characters.isdisjoint(self._doubtful) and (not self._nfc or unicodedata.is_normalized("NFC", part))

    def _meet(self, characters: set[str]) -> None:
        """Tries out how the tokenizer cuts around each character."""
        for character in characters:
            text = CONTEXTS.format(character)
            pieces = [text[start:stop] for _, (start, stop) in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            known = unicodedata.category(character) != "Cn"  # to Python's tables, which say what composes
            same = known and pieces == self._pattern.findall(text)
            (self._proven if same else self._doubtful).add(character)

    def _learn(self, words: list[str]) -> bool:
        """Has new pre-tokens encoded; False where one, alone, is cut further: the pattern looks at its neighbours."""
        for word, encoding in zip(words, self._tokenizer.encode_batch_fast(words, add_special_tokens=False)):
            if self._known(word) and self._pattern.findall(word) not in ([word], []):
                return False
            self._ids[word] = np.array(encoding.ids, np.int32).tobytes()
            self._held += len(word)
            self._new += len(word)
        return True


def pretokens_of(tokenizer_json: str, tokenizer: Tokenizer) -> Pretokens | None:
    """The quick way for a byte-level BPE that cuts by one regular expression; None for any other tokenizer."""
    data: dict[str, Any] = json.loads(tokenizer_json)
    added, normalizer = data["added_tokens"], data["normalizer"]
    plain = not any(token[kind] for token in added for kind in ("lstrip", "rstrip", "single_word"))
    if not plain or len({token["normalized"] for token in added}) > 1:
        return None
    if data["model"]["type"] != "BPE" or data["model"].get("dropout"):
        return None
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    source = pattern_of(data["pre_tokenizer"])
    try:
        pattern = None if source is None else regex.compile(source)
    except regex.error:
        return None
    if pattern is None or pattern.groups:
        return None
    return Pretokens(tokenizer, pattern, {token["content"]: token["id"] for token in added}, normalizer is not None)


def pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The regular expression whose matches are the pre-tokens, if that is all there is to them."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    match steps[:-1]:
        case []:
            return BYTE_LEVEL if steps[-1].get("use_regex", True) else None
        case [{"type": "Split", "pattern": {"Regex": str(source)}, "behavior": "Isolated", "invert": False}]:
            return None if steps[-1].get("use_regex", True) else source
        case _:
            return None
