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
from typing import Any, Literal, NamedTuple

from finetuner.dialogue.message import Dialogue, Message

Part = Literal["content", "thinking", "answer", "reasoning", "arguments"]
THINKING = re.compile(r"\A(\s*<think>)?(.*?)</think>(.*)\Z", re.DOTALL)
FIRST_SENTINEL = 0xF8000
"""Sentinels are private-use characters of plane 15, above those that `control` uses."""


class Slot(NamedTuple):
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
    for number, message in enumerate(dialogue.messages):
        role, content = message.role, message.content
        alone = message.reasoning is None and not (message.tool_calls or message.tool_call_id or message.name)
        if alone and content and not content.isspace() and (role != "assistant" or "</think>" not in content):
            shape.append(role)
            slots.append(Slot(number, "content"))
            texts.append(content)
            continue
        shape.append((role, *parts_of(number, message, slots, texts, names)))
    tools = json.dumps(dialogue.tools, ensure_ascii=False) if dialogue.tools else ""
    rest = "\n".join((tools, *names)) if names else tools
    return Texts(
        (tools, *shape), tuple(slots), tuple(texts), rest, lambda calls: skeleton(dialogue, tuple(slots), calls)
    )


def parts_of(number: int, message: Message, slots: list[Slot], texts: list[str], names: list[str]) -> list[Hashable]:
    """The shape of a message of several parts, whose texts join `slots` and `texts`, its other strings `names`."""

    def take(part: Part, text: str) -> Hashable:
        if part != "arguments" and not text.strip():
            return text
        slots.append(Slot(number, part))
        texts.append(text)
        return None

    parted = THINKING.match(message.content) if message.role == "assistant" else None
    shape: list[Hashable]
    if parted is None:
        shape = [take("content", message.content)]
    else:
        shape = [parted[1], take("thinking", parted[2]), take("answer", parted[3])]
    shape.append(None if message.reasoning is None else ("", take("reasoning", message.reasoning)))
    for call in message.tool_calls:
        take("arguments", arguments_text(call.arguments))
        names += (call.name, call.id or "")
    names += (message.tool_call_id or "", message.name or "")
    return [*shape, tuple((call.name, call.id) for call in message.tool_calls), message.tool_call_id, message.name]


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
