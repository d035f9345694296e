"""The words of a dialogue apart from its shape: what a template copies, and what decides how it copies it.

- Two dialogues of one shape differ in their texts alone, so one skeleton (the template rendered with a sentinel for
  each text) says where the texts of both stand.
- Thinking written inside a message (`<think>a</think>b`) is two texts, since templates part it there.
- A blank text belongs to the shape: templates ask whether a text is empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetuner.dialogue.message import Dialogue, Message

Part = Literal["content", "thinking", "answer", "reasoning", "arguments"]
THINKING = re.compile(r"\A(\s*<think>)?(.*?)</think>(.*)\Z", re.DOTALL)
FIRST_SENTINEL = 0xF2000
"""Sentinels are private-use characters of plane 15, above those that `control` and `template` use."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Which text of a dialogue: the part of the message of that number."""

    message: int
    part: Part


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a dialogue in order, their slots, and the hashable rest: its shape."""

    shape: Hashable
    slots: tuple[Slot, ...]
    texts: tuple[str, ...]
    rest: str
    """Every other string of the row: the tools, and the names and numbers of calls."""
    skeleton: Callable[[bool], Dialogue]
    """The dialogue with sentinels for texts; True: the arguments of tool calls too, False: those are its own."""


def sentinel(number: int) -> str:
    """The character that stands for the text of that number in a skeleton."""
    return chr(FIRST_SENTINEL + number)


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """How `tojson` writes the arguments of a call."""
    return json.dumps(arguments, ensure_ascii=False)


def texts_of(dialogue: Dialogue) -> Texts:
    """The texts and the shape of `dialogue`."""
    shape: list[Hashable] = []
    slots: list[Slot] = []
    texts: list[str] = []
    names: list[str] = []

    def take(number: int, part: Part, text: str) -> Hashable:
        if not text.strip() and part != "arguments":
            return text
        slots.append(Slot(number, part))
        texts.append(text)
        return None

    for number, message in enumerate(dialogue.messages):
        content, parted = message.content, None
        if message.role == "assistant" and "</think>" in content:
            parted = THINKING.match(content)
        if parted is None:
            body = take(number, "content", content)
        else:
            body = (parted[1], take(number, "thinking", parted[2]), take(number, "answer", parted[3]))
        if message.reasoning is None and not message.tool_calls and message.tool_call_id is None and not message.name:
            shape.append((message.role, body))
            continue
        reasoning = None if message.reasoning is None else ("", take(number, "reasoning", message.reasoning))
        calls = []
        for call in message.tool_calls:
            take(number, "arguments", arguments_text(call.arguments))
            calls.append((call.name, call.id))
            names += (call.name, call.id or "")
        names += (message.tool_call_id or "", message.name or "")
        shape.append((message.role, body, reasoning, tuple(calls), message.tool_call_id, message.name))
    tools = json.dumps(dialogue.tools, ensure_ascii=False) if dialogue.tools else ""
    rest = "\n".join((tools, *names)) if names else tools
    return Texts(
        (tools, *shape), tuple(slots), tuple(texts), rest, lambda calls: skeleton(dialogue, tuple(slots), calls)
    )


def skeleton(dialogue: Dialogue, slots: tuple[Slot, ...], calls: bool) -> Dialogue:
    """`dialogue` with the sentinel of its number in place of every text."""
    by_message: dict[int, dict[Part, list[str]]] = {}
    for number, slot in enumerate(slots):
        by_message.setdefault(slot.message, {}).setdefault(slot.part, []).append(sentinel(number))
    filled = [fill(message, by_message.get(k, {}), calls) for k, message in enumerate(dialogue.messages)]
    return replace(dialogue, messages=tuple(filled))


def fill(message: Message, marks: Mapping[Part, list[str]], calls: bool) -> Message:
    """`message` with sentinels for the parts that have one."""
    if "content" in marks:
        message = replace(message, content=marks["content"][0])
    elif "thinking" in marks or "answer" in marks:
        parted = THINKING.match(message.content)
        assert parted is not None, "a message with a thinking or answer slot has the mark between them"
        thinking = marks.get("thinking", [parted[2]])[0]
        answer = marks.get("answer", [parted[3]])[0]
        message = replace(message, content=f"{parted[1] or ''}{thinking}</think>{answer}")
    if "reasoning" in marks:
        message = replace(message, reasoning=marks["reasoning"][0])
    if calls and "arguments" in marks:
        filled = (
            replace(call, arguments={mark: 0})
            for call, mark in zip(message.tool_calls, marks["arguments"], strict=True)
        )
        message = replace(message, tool_calls=tuple(filled))
    return message
