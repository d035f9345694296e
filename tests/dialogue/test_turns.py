"""Which turns are learned, thinking and tool calls among them."""

from __future__ import annotations

from typing import Any

import families
import oracles
import pytest
import sides
from tokenizers import Tokenizer

from finetuner.dialogue import locate
from finetuner.dialogue.message import RowError

FAMILIES = sorted(oracles.FAMILIES)
SEEDS = range(200)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_is_trained_after_the_ids_that_ask_for_it(family: str) -> None:
    encoder, tokenizer = sides.spec(family, turns="split").build(), sides.huggingface(family)
    for seed in SEEDS:
        talk = families.conversation(seed)
        for message in talk:
            message["content"] = message["content"].lstrip()
        asked = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
        (samples,) = encoder.encode([sides.dialogue(talk)])
        assert not isinstance(samples, RowError)
        for number, sample in zip(asked, samples, strict=True):
            prompt = tokenizer.apply_chat_template(talk[:number], add_generation_prompt=True)["input_ids"]
            start = int(sample.learned.argmax())
            assert sample.ids[:start].tolist() == prompt
            assert sample.learned[start:].sum() > 1


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "internlm2", "llama3"])
@pytest.mark.parametrize("arguments", [{}, {"a": 1, "b": {"c": ["é", None]}}, {"<|im_end|>": "</s>\n"}])
@pytest.mark.parametrize("system", [True, False])
def test_tool_calls_are_learned_and_answers_are_not(family: str, arguments: dict[str, Any], system: bool) -> None:
    talk = families.tool_talk(arguments, "" if family == "llama3" else "let me see")[0 if system else 1 :]
    for tools in (families.TOOLS, []):
        encoded = sides.one(sides.spec(family).build(), sides.dialogue(talk, tools))
        assert sides.pairs(encoded) == sides.expected(family, talk, tools)
    plain = families.tool_talk({"a": 1})
    rendered = sides.huggingface(family).apply_chat_template(
        plain, tools=[families.TOOLS[0] | {"x": 1}], tokenize=False
    )
    assert '"x": 1' in rendered or family == "internlm2"


THINKING = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\none\n</think>\n\nA"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "<think>\n\ntwo {x}\n\n</think>\n\n\nB"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "<think>\nthree\n</think>\n\nC"},
]


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_thinking_of_old_turns_is_left_out_counted_and_not_learned(family: str) -> None:
    encoded = sides.one(sides.spec(family).build(), sides.dialogue(THINKING))
    assert sides.pairs(encoded) == sides.expected(family, THINKING)
    assert encoded.think_dropped == 2


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_split_turns_learn_all_the_thinking(family: str) -> None:
    (samples,) = sides.spec(family, turns="split").build().encode([sides.dialogue(THINKING)])
    assert not isinstance(samples, RowError)
    for number, sample in zip((1, 3, 5), samples, strict=True):
        asked = sides.huggingface(family).apply_chat_template(THINKING[:number], add_generation_prompt=True)
        assert sample.ids[: int(sample.learned.argmax())].tolist() == asked["input_ids"]
        wanted = sides.expected(family, THINKING[: number + 1])
        last = len(asked["input_ids"])
        assert sides.pairs(sample) == [(i, learned and k >= last) for k, (i, learned) in enumerate(wanted)]


def test_thinking_in_its_own_field_is_the_same_for_qwen3() -> None:
    parted = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A", "reasoning_content": "one"},
    ]
    encoder = sides.spec("qwen3").build()
    assert sides.pairs(sides.one(encoder, sides.dialogue(parted))) == sides.pairs(
        sides.one(encoder, sides.dialogue(THINKING[:2]))
    )


def test_chatml_copies_thinking_and_learns_every_turn() -> None:
    encoded = sides.one(sides.spec("chatml").build(), sides.dialogue(THINKING))
    assert sides.pairs(encoded) == sides.expected("chatml", THINKING)
    assert encoded.think_dropped == 0


def test_last_learns_the_last_turn_alone() -> None:
    talk = families.conversation(3)
    encoded = sides.one(sides.spec("chatml", turns="last").build(), sides.dialogue(talk))
    wanted = sides.expected("chatml", talk)
    last = max(k for k, message in enumerate(talk) if message["role"] == "user")
    before = len(sides.expected("chatml", talk[: last + 1]))
    assert sides.pairs(encoded) == [(i, learned and k >= before) for k, (i, learned) in enumerate(wanted)]


def test_messages_marked_as_not_learned_are_not() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}] * 2
    talk[3] = talk[3] | {"loss": True}
    tokenizer = Tokenizer.from_str(families.byte_level())
    encoded = sides.one(sides.spec("chatml").build(), sides.dialogue(talk))
    assert [tokenizer.id_to_token(i) for i, learned in sides.pairs(encoded) if learned] == ["b", "<|im_end|>"]
    with pytest.raises(RowError) as error:
        sides.one(sides.spec("chatml").build(), sides.dialogue(talk[:2]))
    assert error.value.kind == "no-target"


def test_the_check_of_thinking_sees_old_turns_that_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "THINKING_PARTS", ())
    encoded = sides.one(sides.spec("qwen3").build(), sides.dialogue(THINKING))
    assert sides.pairs(encoded) != sides.expected("qwen3", THINKING)
