"""Rows as they are found -> dialogues; a wrong row is refused with its reason, never mended in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetuner.dialogue import rows
from finetuner.dialogue.message import Dialogue, Document, Message, RowError, ToolCall
from finetuner.dialogue.rows import alpaca, conversation, openai, sharegpt, text

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKED, ANSWERED = Message("user", "q"), Message("assistant", "a")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("nothing", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_an_alpaca_row_without_input_asks_the_instruction_alone(nothing: dict[str, Any]) -> None:
    row = {"instruction": "q", "output": "a", "history": None, "system": None, **nothing}
    assert alpaca(row) == Dialogue((ASKED, ANSWERED))


def test_an_alpaca_row_with_everything() -> None:
    row = {"instruction": "q", "input": "more\n", "output": "a", "system": "s", "history": [["x", "y"], ("z", "w")]}
    assert alpaca(row).messages == (
        Message("system", "s"), Message("user", "x"), Message("assistant", "y"), Message("user", "z"),
        Message("assistant", "w"), Message("user", "q\nmore\n"), ANSWERED,
    )  # fmt: skip


def test_openai_messages_keep_calls_reasoning_loss_and_tools() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "22", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "loss": True, "tool_calls": None},
        ],
        "tools": json.dumps([TOOL]),
    }
    assert openai(row) == Dialogue(
        (
            Message("system", "s"),
            Message("user", "q!"),
            Message("assistant", "", False, (ToolCall("f", {"a": 1}, "c1"),)),
            Message("tool", "22", tool_call_id="c1"),
            Message("assistant", "a", True, reasoning="r"),
        ),
        (TOOL,),
    )
    as_object = {"function_call": {"name": "f", "arguments": {"a": 1}}}
    old = [USER, {"role": "assistant"} | as_object, {"role": "function", "name": "f", "content": ""}, ANSWER]
    assert openai({"messages": old}).messages[1:3] == (
        Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}),)),
        Message("tool", "", name="f"),
    )


def test_sharegpt_calls_join_the_assistants_turn() -> None:
    call = json.dumps({"name": "f", "arguments": {"a": 1}})
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "let me see"},
            {"from": "function_call", "value": call},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "s",
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    made = ToolCall("f", {"a": 1})
    assert sharegpt(row) == Dialogue(
        (
            Message("system", "s"), ASKED, Message("assistant", "let me see", tool_calls=(made, made)),
            Message("tool", "1"), Message("tool", "2"), ANSWERED,
        ),
        (TOOL,),
    )  # fmt: skip
    assert sharegpt({"conversations": row["conversations"][:2], "tools": "[]"}).tools == ()


def test_xtuners_conversation_keeps_system_and_loss() -> None:
    turns = [{"system": "s", "input": "q", "output": "a"}, {"input": "q", "output": "a", "output_with_loss": False}]
    assert conversation({"conversation": turns}).messages == (
        Message("system", "s"), ASKED, ANSWERED, ASKED, Message("assistant", "a", False)
    )  # fmt: skip


def test_a_text_is_a_document() -> None:
    assert text({"text": " a "}) == Document(" a ")


def openai_row(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


WRONG: list[tuple[Any, Any, str, str]] = [
    (alpaca, [1], "not-an-object", "{...}"),
    (alpaca, {"instruction": "q"}, "missing-field", "output"),
    (alpaca, {"instruction": "q", "outptu": "a"}, "missing-field", "did you mean 'output'?"),
    (alpaca, {"instructions": "q", "output": "a"}, "missing-field", "did you mean 'instruction'?"),
    (alpaca, {"instruction": "q", "inptu": "i", "output": "a"}, "missing-field", "did you mean 'input'?"),
    (alpaca, {"instruction": "q", "output": None}, "empty", "a text"),
    (alpaca, {"instruction": "q", "output": " \n"}, "empty", "a text"),
    (alpaca, {"instruction": "", "input": None, "output": "a"}, "empty", "a text"),
    (alpaca, {"instruction": "q", "output": 3}, "type", "a text"),
    (alpaca, {"instruction": "q", "output": "a", "history": [["x"]]}, "type", '["question", "answer"]'),
    (alpaca, {"instruction": "q", "output": "a", "history": [["x", None]]}, "empty", "a text"),
    (text, {"txt": "a"}, "missing-field", "text"),
    (text, {"text": ""}, "empty", "a text"),
    (openai, {"conversations": []}, "missing-field", "messages"),
    (openai, {"mesages": [USER, ANSWER]}, "missing-field", "did you mean 'messages'?"),
    (openai, openai_row(), "empty", ""),
    (openai, openai_row(USER, {"role": "asistant", "content": "a"}), "role", "did you mean 'assistant'?"),
    (openai, openai_row(USER, {"role": 7, "content": "a"}), "role", "user"),
    (openai, openai_row(USER, "a"), "not-an-object", "{...}"),
    (openai, openai_row(ANSWER), "order", "system or user"),
    (openai, openai_row(USER, USER, ANSWER), "order", "assistant"),
    (openai, openai_row(USER, ANSWER, ANSWER), "order", "user"),
    (openai, openai_row(USER, {"role": "system", "content": "s"}, ANSWER), "order", "assistant"),
    (openai, openai_row(USER, ANSWER, {"role": "tool", "content": "t"}), "order", "user"),
    (openai, openai_row(USER, calling({}), ANSWER), "order", "tool"),
    (openai, openai_row(USER), "no-assistant", "assistant"),
    (openai, openai_row(USER, {"role": "assistant", "content": None}), "empty", "a text"),
    (openai, openai_row(USER, {"role": "assistant"}), "missing-field", "content"),
    (openai, openai_row({"role": "user", "content": " "}, ANSWER), "empty", "a text"),
    (openai, openai_row(USER, ANSWER | {"weight": 0.5}), "type", "true, false, 0 or 1"),
    (openai, openai_row(USER, ANSWER | {"weight": 0, "loss": True}), "type", "one of them"),
    (openai, openai_row(USER | {"loss": True}, ANSWER), "role", "assistant"),
    (openai, openai_row(USER, calling("{a}")), "tool-arguments", "JSON"),
    (openai, openai_row(USER, calling("[1]")), "tool-arguments", "arguments"),
    (openai, openai_row(USER, calling(None)), "tool-arguments", "arguments"),
    (openai, openai_row(USER, ANSWER, tools="nothing"), "tools", "JSON"),
    (openai, openai_row(USER, ANSWER, tools=[{"type": "function"}]), "tools", "name"),
    (
        openai,
        openai_row({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
        "image",
        "text",
    ),
    (openai, openai_row({"role": "user", "content": [{"type": "audio"}]}, ANSWER), "type", "text"),
    (sharegpt, {"conversations": [{"from": "human", "value": "q"}, {"from": "gtp", "value": "a"}]}, "role", "'gpt'"),
    (sharegpt, {"conversations": [{"from": "gpt", "value": "a"}]}, "order", "user"),
    (sharegpt, {"conversations": [{"from": "human", "valeu": "q"}]}, "missing-field", "did you mean 'value'?"),
    (sharegpt, {"conversations": "[]"}, "type", "[...]"),
    (conversation, {"conversation": [{"output": "a"}]}, "empty", "rows=text"),
    (conversation, {"conversation": [{"input": "q", "output": "a", "output_with_loss": 0.5}]}, "type", "true"),
    (conversation, {"conversation": [{"input": "q", "output": "a", "need_eos_token": False}]}, "type", "need_eos"),
]


@pytest.mark.parametrize(("read", "row", "kind", "fits"), WRONG)
def test_a_wrong_row_is_refused_with_what_would_fit(read: Any, row: Any, kind: str, fits: str) -> None:
    with pytest.raises(RowError) as error:
        read(row)
    assert error.value.kind == kind
    assert fits in error.value.fits
    assert error.value.reason


def test_an_error_names_the_message() -> None:
    with pytest.raises(RowError, match=r"messages\[1\]"):
        openai(openai_row(USER, {"role": "assistant", "content": ""}))


def test_the_word_none_never_comes_from_a_missing_value() -> None:
    for missing in ("input", "system", "history"):
        dialogue = alpaca({"instruction": "q", "output": "a", missing: None})
        assert [message.content for message in dialogue.messages] == ["q", "a"]


def test_the_check_of_order_sees_a_missing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ordered", tuple)
    assert len(openai(openai_row(USER, USER, ANSWER)).messages) == 3
