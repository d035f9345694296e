"""A row -> a dialogue: the forms in which data sets are found.

- A row that does not fit raises `RowError`; nothing is dropped, replaced or turned into the word None.
- A function of your own is as good: it takes a row and returns a `Dialogue` or a `Document`.
"""

from __future__ import annotations

from dataclasses import replace

from finetuner.dialogue.fields import (
    absent,
    in_turn,
    loss_of,
    needed_list,
    needed_text,
    object_of,
    optional_text,
    text_of,
    unmisspelt,
)
from finetuner.dialogue.message import Dialogue, Document, Message, Role, Row, RowError
from finetuner.dialogue.tools import call_of, calls_of, tools_of
from finetuner.dialogue.turns import ordered, role_of

OPENAI: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def text(row: Row) -> Document:
    """{"text": "..."} -> a document."""
    return Document(needed_text(object_of(row), "text"))


def alpaca(row: Row) -> Dialogue:
    """{"instruction", "input", "output", "system", "history": [["q", "a"]]} -> "instruction\\ninput" is asked.

    An absent, null or blank input is left out; history comes before.
    """
    row = object_of(row)
    unmisspelt(row, needed=("instruction", "output"), optional=("input", "system", "history"))
    instruction, more = text_of(row, "instruction"), optional_text(row, "input")
    asked = "\n".join(part for part in (instruction, more) if part and part.strip())
    if not asked:
        raise RowError("empty", "nothing is asked: 'instruction' is empty", found=repr(instruction), fits="a text")
    messages = system_message(row)
    for number, pair in enumerate(needed_list(row, "history") if not absent(row, "history") else ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("type", f"history[{number}] is not a pair", found=repr(pair), fits='["question", "answer"]')
        question = needed_text({"question": pair[0]}, "question", f"history[{number}][0]")
        answer = needed_text({"answer": pair[1]}, "answer", f"history[{number}][1]")
        messages += [Message("user", question), Message("assistant", answer)]
    messages += [Message("user", asked), Message("assistant", needed_text(row, "output"))]
    return Dialogue(ordered(messages))


def openai(row: Row) -> Dialogue:
    """{"messages": [{"role", "content", "tool_calls", "reasoning_content", "loss" or "weight"}], "tools": [...]}."""
    row = object_of(row)
    unmisspelt(row, needed=("messages",), optional=("tools",))
    messages = [in_turn("messages", k, openai_message, item) for k, item in enumerate(needed_list(row, "messages"))]
    return Dialogue(ordered(messages), tools_of(row))


def openai_message(given: Row) -> Message:
    """One of `messages`."""
    unmisspelt(given, needed=("role",), optional=("content", "tool_calls", "tool_call_id", "name", "reasoning_content"))
    role = role_of(given, "role", OPENAI)
    calls = calls_of(given)
    if calls and role != "assistant":
        raise RowError("role", "only the assistant calls tools", found=role, fits="assistant")
    content = (optional_text(given, "content") or "") if calls else text_of(given, "content")
    if not calls and role in ("user", "assistant") and not content.strip():
        raise RowError("empty", f"the {role} message is empty", found=repr(given.get("content")), fits="a text")
    return Message(
        role,
        content,
        loss_of(given, role),
        calls,
        optional_text(given, "reasoning_content"),
        optional_text(given, "tool_call_id"),
        optional_text(given, "name"),
    )


def sharegpt(row: Row) -> Dialogue:
    """{"conversations": [{"from": "human" | "gpt" | "function_call" | ..., "value"}], "system", "tools": "[...]"}.

    A function_call belongs to the assistant's turn: what gpt says right before it, and calls in a row, are one message.
    """
    row = object_of(row)
    unmisspelt(row, needed=("conversations",), optional=("system", "tools"))
    messages = system_message(row)
    for k, item in enumerate(needed_list(row, "conversations")):
        message = in_turn("conversations", k, sharegpt_message, item)
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant" and message.tool_calls:
            if last.learned != message.learned:
                raise RowError("type", "a turn is learned as a whole, with its tool calls", fits="one 'loss' for both")
            messages[-1] = replace(last, tool_calls=last.tool_calls + message.tool_calls)
        else:
            messages.append(message)
    return Dialogue(ordered(messages), tools_of(row))


def sharegpt_message(given: Row) -> Message:
    """One of `conversations`."""
    unmisspelt(given, needed=("from", "value"))
    role = role_of(given, "from", SHAREGPT)
    if given["from"] == "function_call":
        value = given["value"]
        calls = value if isinstance(value, list) else [value]
        return Message("assistant", "", loss_of(given, "assistant"), tuple(call_of(call) for call in calls))
    content = needed_text(given, "value") if role in ("user", "assistant") else text_of(given, "value")
    return Message(role, content, loss_of(given, role))


def conversation(row: Row) -> Dialogue:
    """XTuner's {"conversation": [{"system", "input", "output", "output_with_loss"}]}: a turn is a question's answer."""
    row = object_of(row)
    unmisspelt(row, needed=("conversation",))
    turns = needed_list(row, "conversation")
    messages = [m for k, turn in enumerate(turns) for m in in_turn("conversation", k, xtuner_turn, turn)]
    return Dialogue(ordered(messages))


def xtuner_turn(turn: Row) -> list[Message]:
    """The two or three messages of one turn."""
    unmisspelt(turn, needed=("output",), optional=("input", "system", "output_with_loss"))
    if turn.get("need_eos_token", True) is not True:
        found = f"need_eos_token={turn['need_eos_token']!r}"
        raise RowError("type", "a turn always ends with the template's end token", found, "rows without need_eos_token")
    asked = optional_text(turn, "input")
    if asked is None or not asked.strip():
        fits = 'rows=text for continued pretraining: {"text": ...}'
        raise RowError("empty", "the turn has no 'input'", found=repr(turn.get("input")), fits=fits)
    learned = turn.get("output_with_loss")
    if learned is not None and not isinstance(learned, bool):
        raise RowError("type", "'output_with_loss' is not true or false", found=repr(learned), fits="true or false")
    answer = Message("assistant", needed_text(turn, "output"), learned)
    return [*system_message(turn), Message("user", asked), answer]


def system_message(row: Row) -> list[Message]:
    """The system message that a row's "system" field holds, if it holds one."""
    system = optional_text(row, "system")
    return [Message("system", system)] if system and system.strip() else []
