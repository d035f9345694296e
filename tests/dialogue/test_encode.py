"""What is trained on: ids and learned places are the oracle's; each mutant turns its check red."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import families
import numpy as np
import oracles
import pytest
import sides
from tokenizers import Tokenizer, processors

from finetuner.dialogue import control, encode, locate, shortcut, structure
from finetuner.dialogue.message import Dialogue, Document, Message, RowError

FAMILIES = sorted(oracles.FAMILIES)
SEEDS = range(200)
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"} | dict.fromkeys(
    ("chatml", "internlm2", "qwen2_5", "qwen3"), "<|im_end|>"
)


def agrees(family: str, tokenizer_json: str, seeds: range, rstrip: tuple[str, ...] = ()) -> bool:
    """Whether ids and learned places are the oracle's; every second conversation holds control strings."""
    encoder = sides.spec(family, tokenizer_json).build()
    talks = [families.conversation(seed, control=seed % 2 == 1) for seed in seeds]
    found = encoder.encode([sides.dialogue(talk) for talk in talks])
    return all(
        not isinstance(got, RowError)
        and sides.pairs(got[0]) == sides.expected(family, talk, None, tokenizer_json, rstrip=rstrip)
        for got, talk in zip(found, talks, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_places_are_the_oracles(family: str) -> None:
    assert agrees(family, families.byte_level(), SEEDS)
    assert agrees(family, families.sentencepiece(), SEEDS)
    assert agrees(family, families.byte_level(rstrip=True), range(60), tuple(families.SPECIAL))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokenizer_json", [families.byte_level(), families.sentencepiece()], ids=["bytes", "pieces"])
def test_ids_equal_apply_chat_template(family: str, tokenizer_json: str) -> None:
    encoder, tokenizer = sides.spec(family, tokenizer_json).build(), sides.huggingface(family, tokenizer_json)
    for seed in SEEDS:
        talk = families.conversation(seed)
        encoded = sides.one(encoder, sides.dialogue(talk))
        assert encoded.ids.tolist() == tokenizer.apply_chat_template(talk)["input_ids"]
        assert encoded.ids.tolist().count(tokenizer.bos_token_id) <= 1
        assert encoded.control == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_ids_are_the_rendered_text(family: str) -> None:
    encoder, tokenizer = sides.spec(family).build(), sides.huggingface(family)
    for seed in SEEDS:
        talk = families.conversation(seed, control=True)
        ids = sides.one(encoder, sides.dialogue(talk)).ids
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_ends_with_a_learned_end_token(family: str) -> None:
    encoder, tokenizer = sides.spec(family).build(), Tokenizer.from_str(families.byte_level())
    end = tokenizer.token_to_id(ENDS.get(family, sides.EOS))
    for seed in range(40):
        talk = families.conversation(seed, control=True)
        learned_ends = [pair for pair in sides.pairs(sides.one(encoder, sides.dialogue(talk))) if pair == (end, True)]
        assert len(learned_ends) == sum(message["role"] == "assistant" for message in talk)


def test_a_system_message_is_given_to_dialogues_without_one() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = sides.spec("chatml", system="be kind").build()
    own = [{"role": "system", "content": "mine"}, *talk]
    assert sides.pairs(sides.one(encoder, sides.dialogue(talk))) == sides.expected(
        "chatml", [{"role": "system", "content": "be kind"}, *talk]
    )
    assert sides.pairs(sides.one(encoder, sides.dialogue(own))) == sides.expected("chatml", own)


def test_a_document_is_learned_whole_and_ends_once() -> None:
    tokenizer = Tokenizer.from_str(families.byte_level())
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.encode_special_tokens = True
    words = tokenizer.encode("one</s> two", add_special_tokens=False).ids
    for after, tail in (("$A", [end]), ("<s> $A", [end]), ("<s> $A </s>", [end])):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=after, pair="$A $B", special_tokens=[("<s>", begin), ("</s>", end)]
        )
        spec = replace(sides.spec("chatml"), tokenizer_json=tokenizer.to_str(), template=None)
        ((encoded,),) = spec.build().encode([Document("one</s> two")])
        head = [begin] if "<s>" in after else []
        assert encoded.ids.tolist() == head + words + tail
        assert encoded.learned.tolist() == [False] * len(head) + [True] * (len(words) + 1)
        assert encoded.control == 1


def with_bos() -> str:
    """A tokenizer that puts <s> before every text of its own accord."""
    built = Tokenizer.from_str(families.byte_level())
    begin = built.token_to_id("<s>")
    built.post_processor = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", begin)])
    return str(built.to_str())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_post_processor_adds_no_second_bos(family: str) -> None:
    talk = families.conversation(5)
    encoded = sides.one(sides.spec(family, with_bos()).build(), sides.dialogue(talk))
    assert sides.pairs(encoded) == sides.expected(family, talk)


def test_a_wrong_row_spoils_no_other() -> None:
    good, cut = sides.dialogue(families.conversation(1)), sides.dialogue(families.conversation(2, control=True))
    half = Dialogue((Message("user", "a\ud83d"), Message("assistant", "b")))
    asked = Dialogue((Message("user", "a", learned=True), Message("assistant", "b")))
    found = sides.spec("chatml").build().encode([cut, half, good, asked, Document("x"), Document("")])
    kinds = [got.kind if isinstance(got, RowError) else "" for got in found]
    assert kinds == ["", "half-character", "", "role", "", "empty"]
    assert isinstance(found[2], list)
    assert sides.pairs(found[2][0]) == sides.expected("chatml", families.conversation(1))


def test_a_spec_travels_and_its_fingerprint_tells_every_field() -> None:
    spec = sides.spec("chatml")
    assert pickle.loads(pickle.dumps(spec)).fingerprint == spec.fingerprint == sides.spec("chatml").fingerprint
    changed = [
        replace(spec, tokenizer_json=families.sentencepiece()),
        replace(spec, template=sides.spec("zephyr").template),
        replace(spec, template_name="x"),
        replace(spec, special=()),
        replace(spec, eos_id=5),
        replace(spec, turns="last"),
        replace(spec, system="x"),
    ]
    assert len({spec.fingerprint, *(other.fingerprint for other in changed)}) == 8


Patch = Callable[[pytest.MonkeyPatch], None]
span_as_it_is = structure.Structure.spans
learned_as_it_is = shortcut.Shortcut.learned
offsets_as_they_are = encode.learned_tokens
end_as_it_is = locate.end_of_turn


def shifted(patch: pytest.MonkeyPatch) -> None:
    def learned(self: shortcut.Shortcut, *given: Any) -> Any:
        learned_T = learned_as_it_is(self, *given)
        return None if learned_T is None else np.roll(learned_T, 1)

    patch.setattr(shortcut.Shortcut, "learned", learned)


def shifted_characters(patch: pytest.MonkeyPatch) -> None:
    def spans(self: structure.Structure, *given: Any) -> Any:
        return [(start + 1, stop + 1) for start, stop in span_as_it_is(self, *given) or []]

    patch.setattr(shortcut.Shortcut, "learned", lambda self, *given: None)
    patch.setattr(structure.Structure, "spans", spans)


def endless(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(locate, "end_of_turn", lambda whole, n, start, ends: end_as_it_is(whole, n, start, ends) - 5)


def unsplit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(control.Control, "spoken", lambda self, texts: False)


def unread(patch: pytest.MonkeyPatch) -> None:
    def learned(self: shortcut.Shortcut, ids_T: Any, controls: Any) -> Any:
        read_T = ids_T.copy()
        for turn in self.turns:
            start = controls[turn.after] + 1
            read_T[start : start + len(turn.lead)] = turn.lead
        return learned_as_it_is(self, read_T, controls)

    patch.setattr(shortcut.Shortcut, "learned", learned)


def overreaching(patch: pytest.MonkeyPatch) -> None:
    def whole_words(encoding: Any, spans: Any, trimming: Any) -> Any:
        learned_T = offsets_as_they_are(encoding, spans, trimming)
        for start, _ in spans:
            learned_T[encoding.char_to_token(start) - 1] = True
        return learned_T

    patch.setattr(encode, "learned_tokens", whole_words)


@pytest.mark.parametrize("mutant", [shifted, shifted_characters, endless, unsplit, overreaching])
def test_the_oracle_sees_mutants(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    assert not agrees("chatml", families.byte_level(), range(60))


def joins_are_seen() -> bool:
    """Whether a token that joins the prompt's last letters to the answer's first is left out."""
    source = "{% for m in messages %}{{ '<|im_start|>' + {'user': 'user:', 'assistant': 'assistan'}[m['role']] }}"
    source += "{{ m['content'] + '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistan' if add_generation_prompt }}"
    encoder = replace(sides.spec("chatml"), template=source).build()
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t over the lazy dog"}]
    start, end = oracles.token("<|im_start|>"), oracles.token("<|im_end|>")
    asked = [start, oracles.said("user:q"), end, start, oracles.said("assistan")]
    pieces = [*asked, oracles.said("t over the lazy dog", True), oracles.token("<|im_end|>", True)]
    wanted = oracles.tokens(pieces, Tokenizer.from_str(families.byte_level()))
    return sides.pairs(sides.one(encoder, sides.dialogue(talk))) == wanted


def test_a_token_that_joins_prompt_and_answer_is_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joins_are_seen()
    unread(monkeypatch)
    assert not joins_are_seen()


def test_offsets_find_what_the_shortcut_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut.Shortcut, "learned", lambda self, *given: None)
    for family in FAMILIES:
        assert agrees(family, families.byte_level(), range(40))
        assert agrees(family, families.sentencepiece(), range(40))


class Doubling:
    """A tokenizer that adds its own tokens around a text that has them already."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=True)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Any:
        return self._tokenizer.encode_batch(texts, add_special_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=False)


def test_the_check_of_bos_sees_a_second_one() -> None:
    encoder = sides.spec("llama3", with_bos()).build()
    talk = families.conversation(5)
    encoder._tokenizer, encoder._pretokens = Doubling(Tokenizer.from_str(with_bos())), None
    with pytest.raises(RowError, match="control tokens"):
        sides.one(encoder, sides.dialogue(talk))
