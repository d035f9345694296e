"""Ids from remembered pre-tokens are the tokenizer's own, for every text; where that is in doubt, it cuts itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finetuner.dialogue import pretokens
from finetuner.dialogue.pretokens import Pretokens, pretokens_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im|>", "<think>"]
TEXTS = [
    "It's a test, isn't it?  Yes: 12345 ones.\n\n",
    "Grüße aus Köln – naïve café ☕ 你好,世界",
    "def f(x):\n\treturn x**2",
]


def tokenizer(pattern: str | None, *, nfc: bool = False, texts: list[str] = TEXTS) -> Tokenizer:
    """A byte-level BPE that cuts by `pattern`, or as GPT-2 does."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC() if nfc else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts * 3, trainer)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return made


KINDS = {"gpt2": (None, False), "llama3": (LLAMA3, False), "qwen2": (QWEN2, True)}
MADE = {name: tokenizer(pattern, nfc=nfc) for name, (pattern, nfc) in KINDS.items()}


def quick(made: Tokenizer) -> Pretokens:
    found = pretokens_of(made.to_str(), made)
    assert found is not None
    return found


QUICK = {name: quick(made) for name, made in MADE.items()}
alphabet = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("aZ 09\n\r\t'.,ſK\x1c\x85\u00a0\u2028é\u0301½²Ⅷ中あ"),
    st.sampled_from(SPECIAL),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(alphabet, max_size=30).map("".join), min_size=1, max_size=4))
def test_ids_are_the_tokenizers(kind: str, texts: list[str]) -> None:
    found = QUICK[kind].encode(["", *texts])
    assert found is not None
    for text, ids_T in zip(["", *texts], found, strict=True):
        assert ids_T.tolist() == MADE[kind].encode(text, add_special_tokens=False).ids


def agrees(kind: str, texts: list[str]) -> bool:
    own, found = MADE[kind], quick(MADE[kind]).encode(["", *texts])
    want = [own.encode(text, add_special_tokens=False).ids for text in texts]
    return found is not None and [ids_T.tolist() for ids_T in found[1:]] == want


def test_an_unproven_character_would_be_cut_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    # The two engines are built on other versions of Unicode: on what is new to one of them they disagree.
    found = quick(MADE["llama3"])
    found._meet({chr(number) for number in range(0x10000) if not 0xD800 <= number < 0xE000})
    texts = [pretokens.CONTEXTS.format(character) for character in sorted(found._doubtful)]
    assert texts, "there is none: the mutant below could not fail"
    monkeypatch.setitem(MADE, "llama3", tokenizer(LLAMA3, texts=texts[:40] * 3))
    assert agrees("llama3", texts)
    monkeypatch.setattr(Pretokens, "_known", lambda self, part: True)
    assert not agrees("llama3", texts)


def test_what_composes_is_left_to_the_normalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["cafe\u0301 e\u0301te\u0301"]
    assert agrees("qwen2", texts)
    monkeypatch.setattr(pretokens.unicodedata, "is_normalized", lambda form, text: True)
    assert not agrees("qwen2", texts)


def test_the_longest_added_token_wins() -> None:
    made = tokenizer(LLAMA3)
    made.add_special_tokens([AddedToken("<|im_start|>x", normalized=False)])
    texts = ["<|im_start|>x<|im_start|>y<|im|>"]
    ids = quick(made).encode(["", *texts])
    assert ids is not None
    assert ids[1].tolist() == made.encode(texts[0]).ids


def test_a_wrong_pattern_is_caught_in_the_first_text() -> None:
    wrong = Pretokens(MADE["llama3"], regex.compile(r"\S+|\s+"), {}, False)
    wrong._doubtful, wrong._odd = set(), None
    with pytest.raises(AssertionError, match="cut otherwise"):
        wrong.encode(["Hello, dear world: 12345 and more"])


def test_a_pattern_that_looks_at_its_neighbours_is_given_up() -> None:
    made = tokenizer(r"(?<=a)b+|[^b]+|b")
    assert quick(made).encode(["xabbb"]) is None


def test_text_that_hardly_repeats_is_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "TRIAL", 1000)
    draw = np.random.default_rng(0)
    fresh = ["".join(map(chr, draw.integers(0x4E00, 0x9000, 50))) for _ in range(40)]
    assert quick(MADE["llama3"]).encode(fresh) is None
    assert quick(MADE["llama3"]).encode(["the same words again and again " * 50] * 40) is not None


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "HELD", 50)
    found = quick(MADE["gpt2"])
    for text in TEXTS * 3:
        done = found.encode([text, "a<|im_end|>"])
        assert done is not None
        assert [ids_T.tolist() for ids_T in done] == [MADE["gpt2"].encode(t).ids for t in (text, "a<|im_end|>")]
        assert len(found._ids) < 60


CHANGES: dict[str, dict[str, Any]] = {
    "another model": {"model": {"type": "WordPiece"}},
    "another normalizer": {"normalizer": {"type": "Lowercase"}},
    "no pre-tokenizer": {"pre_tokenizer": None},
    "metaspace": {"pre_tokenizer": {"type": "Metaspace"}},
    "a blank in front": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tokenizers_are_left_alone(change: str) -> None:
    data = json.loads(MADE["gpt2"].to_str()) | CHANGES[change]
    assert pretokens_of(json.dumps(data), MADE["gpt2"]) is None


@pytest.mark.parametrize("kind", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_swallow_blanks_are_left_alone(kind: str) -> None:
    data = json.loads(MADE["gpt2"].to_str())
    data["added_tokens"][0][kind] = True
    assert pretokens_of(json.dumps(data), MADE["gpt2"]) is None
