"""Finds where the assistant's turns begin and end in what a template writes; refuses where that is not certain.

Once for each shape of dialogue:

1. The template renders the skeleton: the dialogue with a sentinel for each text. What stands between the sentinels is
   the template's own.
2. A turn begins where the text that asks for it ends: `messages[:k]` rendered with the generation prompt must be a
   prefix of the whole. So a turn is trained after exactly the text that stands before it when it is asked for.
3. A turn ends with the first end-of-turn token after its last text, and before the next message's first.
4. A template with `{% generation %}` blocks marks its turns itself: then those blocks are the turns.

A turn whose thinking the template leaves out is not learned (the words would come without the thinking that led to
them), nor is one that was asked for with earlier thinking in view that the whole leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from finetuner.dialogue.ends import Ends
from finetuner.dialogue.message import Dialogue, RowError
from finetuner.dialogue.structure import Place, Span, Structure
from finetuner.dialogue.template import Template
from finetuner.dialogue.texts import FIRST_SENTINEL, Slot, Texts, arguments_text, sentinel

MARK = f"[{chr(FIRST_SENTINEL)}-\U000ffffd]"
THINKING_PARTS = ("thinking", "reasoning")
CONTENTS = re.compile(MARK)
CONTENTS_AND_ARGUMENTS = re.compile(rf'\{{"{MARK}": 0\}}|{MARK}')


class Skeleton:
    """The text of a dialogue with sentinels in it, cut at the sentinels."""

    def __init__(self, template: Template, texts: Texts) -> None:
        self.template, self.slots = template, texts.slots
        arguments = [number for number, slot in enumerate(texts.slots) if slot.part == "arguments"]
        self.dialogue = texts.skeleton(True)
        self.text = template.render(self.dialogue)
        self.shared = all(arguments_text({sentinel(number): 0}) in self.text for number in arguments)
        """Whether arguments are texts like others; else the template takes them apart, and the shape has its own."""
        if not self.shared:
            self.dialogue = texts.skeleton(False)
            self.text = template.render(self.dialogue)
        found = list((CONTENTS_AND_ARGUMENTS if self.shared and arguments else CONTENTS).finditer(self.text))
        self.order = tuple(ord(match.group().strip('{}": 0')) - FIRST_SENTINEL for match in found)
        self.starts = [match.start() for match in found]
        self.ends = [match.end() for match in found]
        self.pieces = tuple(
            self.text[a:b] for a, b in zip([0, *self.ends], [*self.starts, len(self.text)], strict=True)
        )

    def place(self, character: int) -> Place:
        """The place of a character that stands outside the sentinels."""
        slots = sum(end <= character for end in self.ends)
        return Place(slots, character - sum(b - a for a, b in zip(self.starts[:slots], self.ends[:slots], strict=True)))

    def texts_end(self, number: int, at_least: int) -> int:
        """Where the last text of the message of that number ends."""
        return max([at_least, *(end for i, end in enumerate(self.ends) if self._message(i) == number)])

    def next_text(self, number: int, after: int) -> int:
        """Where the first text of another message begins after a character; the end of the text if there is none."""
        later = (start for i, start in enumerate(self.starts) if start >= after and self._message(i) != number)
        return min(later, default=len(self.text))

    def unwritten(self, *parts: str) -> list[Slot]:
        """The texts of those kinds that the template does not write."""
        written = set(self.order)
        return [slot for number, slot in enumerate(self.slots) if slot.part in parts and number not in written]

    def _message(self, index: int) -> int:
        return self.slots[self.order[index]].message


def structure_of(template: Template, texts: Texts, learned: Sequence[int], ends: Ends) -> tuple[Structure, bool]:
    """The structure of the dialogues of this shape, and whether it holds for all of them (else for this one alone).

    `learned` are the numbers of the messages to learn.

    Raises: RowError("lost") where the template leaves something out, RowError("locate") where a turn is not certain.
    """
    whole = Skeleton(template, texts)
    refuse_losses(whole)
    dropped = sorted({slot.message for slot in whole.unwritten(*THINKING_PARTS)})
    marks = marks_by_message(template, whole.dialogue) if template.has_marks else None
    turns: list[Span] = []
    kept: list[int] = []
    for number in learned:
        if number in dropped:
            refuse_thoughtless(whole, number)
            continue
        prompt = template.render(replace(whole.dialogue, messages=whole.dialogue.messages[:number]), ask=True)
        in_view = whole.text.startswith(prompt)
        if not in_view and any(earlier < number for earlier in dropped):
            continue
        if marks is not None:
            turns.append(marks[number])
        elif in_view:
            turns.append((len(prompt), end_of_turn(whole, number, len(prompt), ends)))
        else:
            reason = f"the text that asks for message {number + 1} is not how the whole dialogue begins"
            fits = "a template that asks as it writes (a bundled one), or turns='split' where only old turns differ"
            raise RowError("locate", reason, fits=fits)
        kept.append(number)
    places = tuple((whole.place(start), whole.place(end)) for start, end in turns)
    return Structure(whole.pieces, whole.order, places, tuple(kept), len(dropped)), whole.shared


def end_of_turn(whole: Skeleton, number: int, start: int, ends: Ends) -> int:
    """The character after the token that ends the turn of message `number`, which starts at `start`."""
    after = whole.texts_end(number, start)
    found = whole.text.find(ends.usual, after)
    if found >= 0 and found + len(ends.usual) <= whole.next_text(number, after):
        return found + len(ends.usual)
    part = replace(whole.dialogue, messages=whole.dialogue.messages[: number + 1])
    prefix = whole.template.render(part).rstrip()
    if len(prefix) > after and whole.text.startswith(prefix) and prefix.endswith(ends.all):
        return len(prefix)
    raise RowError("locate", f"no token ends message {number + 1} in what the template writes", fits=ends.usual)


def marks_by_message(template: Template, dialogue: Dialogue) -> dict[int, Span]:
    """The template's own marks, by the number of the message."""
    marks = template.marks(dialogue)
    speaks = [number for number, message in enumerate(dialogue.messages) if message.role == "assistant"]
    if len(marks) != len(speaks):
        reason = f"{len(marks)} marked blocks for {len(speaks)} assistant messages"
        raise RowError("locate", reason, fits="one {% generation %} block for each assistant message")
    return dict(zip(speaks, marks, strict=True))


def refuse_losses(whole: Skeleton) -> None:
    """Refuses a template that leaves out what was said, the calls that were made or the tools that were offered."""
    messages = whole.dialogue.messages
    fits = "a template that writes it, such as qwen2_5 (tools) or chatml (system)"
    for slot in whole.unwritten("content", "answer"):
        raise RowError("lost", f"the template does not write the {messages[slot.message].role} message", fits=fits)
    if whole.dialogue.tools and whole.template.render(replace(whole.dialogue, tools=())) == whole.text:
        raise RowError("lost", "the template does not write the tools", fits=fits)
    silent = tuple(replace(message, tool_calls=()) for message in messages)
    if silent != messages and whole.template.render(replace(whole.dialogue, messages=silent)) == whole.text:
        raise RowError("lost", "the template does not write the tool calls", fits=fits)


def refuse_thoughtless(whole: Skeleton, number: int) -> None:
    """Refuses a template that leaves a message's thinking out even when that message is the last."""
    last = whole.template.render(replace(whole.dialogue, messages=whole.dialogue.messages[: number + 1]))
    slots = whole.slots
    marks = [sentinel(n) for n, slot in enumerate(slots) if slot.message == number and slot.part in THINKING_PARTS]
    if not all(mark in last for mark in marks):
        fits = "a thinking model's template (qwen3), or rows without thinking"
        raise RowError("lost", f"the template never writes the thinking of message {number + 1}", fits=fits)


def turns_directly(template: Template, dialogue: Dialogue, text: str, learned: Sequence[int], ends: Ends) -> list[Span]:
    """The turns found in the row's own renderings, for a template that changes texts when it copies them.

    Raises: RowError("locate") unless each turn stands between two prefixes of the whole, the second with a turn's end.
    """
    if template.has_marks:
        own = marks_by_message(template, dialogue)
        return [own[number] for number in learned]
    turns = []
    for number in learned:
        prompt = template.render(replace(dialogue, messages=dialogue.messages[:number]), ask=True)
        upto = template.render(replace(dialogue, messages=dialogue.messages[: number + 1])).rstrip()
        usual = ends.all if dialogue.messages[number].tool_calls else (ends.usual,)
        if not (text.startswith(upto) and upto.startswith(prompt) and upto.endswith(usual)):
            reason = f"what the assistant says in message {number + 1} cannot be found for certain in the rendered text"
            raise RowError(
                "locate", reason, fits="a template that copies texts as they are or has {% generation %} marks"
            )
        turns.append((len(prompt), len(upto)))
    return turns
