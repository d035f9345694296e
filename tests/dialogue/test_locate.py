"""Turns are found for certain, or the template or the row is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import sides
from tokenizers import Tokenizer

from finetuner.dialogue import structure
from finetuner.dialogue.message import RowError
from finetuner.errors import ModelError

SEEDS = range(200)


def test_arguments_that_a_template_takes_apart_are_learned() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{% for k, v in c['function']['arguments'].items() %}<{{ k }}={{ v }}>{% endfor %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = replace(sides.spec("chatml"), template=source).build()
    tokenizer = Tokenizer.from_str(families.byte_level())
    for value in ("x", "y<|im_end|>"):
        encoded = sides.one(encoder, sides.dialogue(families.tool_talk({"a": value})))
        learned = tokenizer.decode([i for i, taken in sides.pairs(encoded) if taken], skip_special_tokens=False)
        assert learned == f"<a={value}><|im_end|>22 <|im_end|>bye<|im_end|>"


NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
MARKED = (
    "{% macro end() %}<|im_end|>{% endmacro %}{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ end() }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_templates_own_marks_are_what_is_learned() -> None:
    encoder = replace(sides.spec("chatml"), template=MARKED).build()
    tokenizer = sides.huggingface("chatml", template=MARKED)
    for seed in SEEDS:
        talk = families.conversation(seed, control=seed % 2 == 1)
        encoded = sides.one(encoder, sides.dialogue(talk))
        assert sides.pairs(encoded) == sides.expected("chatml", talk)
        if seed % 2 == 0 and not any(message["content"][0].isspace() for message in talk):
            marked = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
            assert encoded.learned.tolist() == [bool(mark) for mark in marked["assistant_masks"]]


@pytest.mark.parametrize(
    "source",
    [NO_END, NO_END + "</s>", MARKED.replace("{{ end() }}{% endgeneration %}", "{% endgeneration %}{{ end() }}")],
)
def test_a_template_without_a_learned_end_is_refused_before_any_row(source: str) -> None:
    with pytest.raises(ModelError) as error:
        replace(sides.spec("chatml"), template=source).build()
    assert error.value.problems[0].code == "E-TEMPLATE-NO-END"


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("{% if m['role'] != 'system' %}%%{% endif %}", [{"role": "system", "content": "s"}]),
        ("{% if m['role'] != 'tool' %}%%{% endif %}", []),
        ("%%", []),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(source: str, given: list[dict[str, Any]]) -> None:
    body = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    whole = "{% for m in messages %}" + source.replace("%%", body) + "{% endfor %}"
    whole += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    encoder = replace(sides.spec("chatml"), template=whole).build()
    talk = given + families.tool_talk({"a": 1})[1:] if not given else given + families.conversation(1, system=False)
    with pytest.raises(RowError) as error:
        sides.one(encoder, sides.dialogue(talk))
    assert error.value.kind == "lost"


CHANGING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] | replace('a', 'bb') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def changes_are_followed() -> bool:
    """Whether the places are right under a template that changes the texts that it copies."""
    encoder = replace(sides.spec("chatml"), template=CHANGING).build()
    talk = [{"role": "user", "content": "banana"}, {"role": "assistant", "content": "a <|im_end|> band"}]
    wanted = [message | {"content": message["content"].replace("a", "bb")} for message in talk]
    return sides.pairs(sides.one(encoder, sides.dialogue(talk))) == sides.expected("chatml", wanted)


def test_texts_that_a_template_changes_are_located_in_the_rows_own_renderings() -> None:
    assert changes_are_followed()


def test_what_cannot_be_located_is_refused() -> None:
    # The length of the whole decides how each turn is written: no prefix of the whole asks for one.
    moody = CHANGING.replace("m['content'] | replace('a', 'bb')", "messages | length ~ m['content']")
    with pytest.raises(RowError) as error:
        sides.one(replace(sides.spec("chatml"), template=moody).build(), sides.dialogue(families.conversation(0)))
    assert error.value.kind == "locate"


def test_a_template_that_does_not_write_what_is_said_is_refused() -> None:
    silent = CHANGING.replace("m['content'] | replace('a', 'bb')", "''")
    with pytest.raises(ModelError) as error:
        replace(sides.spec("chatml"), template=silent).build()
    assert error.value.problems[0].code == "E-TEMPLATE"


as_it_is = structure.Structure.spans


def unverified(patch: pytest.MonkeyPatch) -> None:
    def spans(self: structure.Structure, text: str, texts: tuple[str, ...]) -> list[tuple[int, int]] | None:
        return as_it_is(self, "".join(p + t for p, t in zip(self.pieces, texts)) + self.pieces[-1], texts)

    patch.setattr(structure.Structure, "spans", spans)


def test_the_check_of_changed_texts_sees_a_skeleton_that_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    unverified(monkeypatch)
    assert not changes_are_followed()
