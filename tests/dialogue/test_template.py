"""A template renders as transformers renders it, refuses what it cannot write, and is found by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import oracles
import pytest
import sides

from finetuner.dialogue import template as module
from finetuner.dialogue.message import Dialogue, Message, RowError
from finetuner.dialogue.template import Template, bundled
from finetuner.errors import ConfigError, ModelError

SPECIAL = {"bos_token": sides.BOS, "eos_token": sides.EOS}
TALK = [{"role": "user", "content": "<b>&\"'é"}, {"role": "assistant", "content": "b", "reasoning_content": "r"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"é": [1, None, "<"]}}}
CALLS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "22", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "done"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"b": 1, "a": 2}}}]


@pytest.mark.parametrize("family", sorted(oracles.FAMILIES))
def test_rendering_equals_apply_chat_template(family: str) -> None:
    ours, theirs = Template(bundled(family), name=family, special=SPECIAL), sides.huggingface(family)
    for seed in range(200):
        talk = families.conversation(seed, control=True)
        dialogue = sides.dialogue(talk)
        assert ours.render(dialogue) == theirs.apply_chat_template(talk, tokenize=False)
        asked = ours.render(replace(dialogue, messages=dialogue.messages[:-1]), ask=True)
        assert asked == theirs.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "internlm2", "llama3"])
def test_tools_are_rendered_as_apply_chat_template_does(family: str) -> None:
    ours, theirs = Template(bundled(family), name=family, special=SPECIAL), sides.huggingface(family)
    for tools in (TOOLS, None):
        rendered = ours.render(sides.dialogue(CALLS, tools))
        assert rendered == theirs.apply_chat_template(CALLS, tools=tools, tokenize=False)


ODD = [
    "{{ messages[0] | tojson }}{{ (messages[1].tool_calls or 1) | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content | tojson }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ bos_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}{{ nothing }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}\n  {% if true %}\n  x\n  {% endif %}\n",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "{{ messages[-1].tool_calls is defined }}{{ messages[-1].thinking }}{{ messages[-1].get('name', 'no') }}",
    "{{ messages[1].reasoning_content }}{{ messages[-2].tool_call_id }}{{ (messages[1].tool_calls or [{}])[0].id }}",
]


@pytest.mark.parametrize("source", ODD)
def test_filters_globals_and_tags_are_those_of_transformers(source: str) -> None:
    theirs = sides.huggingface("chatml", template=source)
    ours = Template(source, name="odd", special=theirs.special_tokens_map)
    for talk, tools in ((TALK, None), (CALLS, TOOLS)):
        assert ours.render(sides.dialogue(talk, tools)) == theirs.apply_chat_template(talk, tools=tools, tokenize=False)


def test_the_check_of_odd_templates_sees_jinjas_own_tojson(monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2.filters import do_tojson

    monkeypatch.setattr(module, "to_json", do_tojson)
    ours = Template("{{ messages[0] | tojson }}", name="odd", special={})
    theirs = sides.huggingface("chatml", template="{{ messages[0] | tojson }}")
    assert ours.render(sides.dialogue(TALK)) != theirs.apply_chat_template(TALK, tokenize=False)


def test_marks_are_found_inside_macros_and_set_blocks() -> None:
    mark = "{% generation %}{{ m['content'] }}!{% endgeneration %}"
    for source in (
        "{% for m in messages %}<{{ m['role'] }}>" + mark + "{% endfor %}",
        "{% macro turn(m) %}<{{ m['role'] }}>"
        + mark
        + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% for m in messages %}{% set t %}<{{ m['role'] }}>" + mark + "{% endset %}{{ t }}{% endfor %}",
    ):
        template, dialogue = Template(source, name="marked", special={}), sides.dialogue(TALK)
        text = template.render(dialogue)
        assert [text[start:stop] for start, stop in template.marks(dialogue)] == ["<b>&\"'é!", "b!"]


@pytest.mark.parametrize("family", ["chatml", "mistral", "gemma", "phi3", "vicuna", "deepseek", "zephyr", "plain"])
def test_a_family_without_tools_refuses_them(family: str) -> None:
    ours = Template(bundled(family), name=family, special=SPECIAL)
    talk = [TALK[0], {"role": "assistant", "content": "b"}]
    for dialogue in (sides.dialogue(talk, TOOLS), sides.dialogue(CALLS)):
        with pytest.raises(RowError) as error:
            ours.render(dialogue)
        assert error.value.kind == "template"
        assert family in error.value.reason


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no') }}", "{{ 'a' + none }}", "{{ messages.x.y }}", "{{ [].__class__.__mro__ }}"]
)
def test_what_goes_wrong_inside_a_template_is_the_rows_error(source: str) -> None:
    with pytest.raises(RowError) as error:
        Template(source, name="bad", special={}).render(Dialogue((Message("user", "a"),)))
    assert error.value.kind == "template"


def test_a_template_is_found_by_name_or_path_and_else_suggested(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ 1 }}")
    assert bundled(str(file)) == "{{ 1 }}"
    assert "<|im_start|>" in bundled("chatml")
    for wrong, best in (("chatlm", "chatml"), ("lama3", "llama3"), (str(tmp_path), "")):
        with pytest.raises(ConfigError) as error:
            bundled(wrong)
        assert error.value.problems[0].code == "E-TEMPLATE-NAME"
        assert best in error.value.problems[0].remedy


def test_broken_jinja_is_told_with_its_line() -> None:
    with pytest.raises(ModelError) as error:
        Template("a\n{% if %}", name="broken", special={})
    assert error.value.problems[0].code == "E-TEMPLATE-SYNTAX"
    assert "line 2" in error.value.problems[0].where


def test_an_encoder_is_built_without_torch_or_transformers() -> None:
    code = "import sys, finetuner.dialogue.encode; print({'torch', 'transformers'} & sys.modules.keys())"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
