"""The token that ends the assistant's turn, found by showing the template two turns of sentinels.

A model that never learns the end of a turn never stops; a template without one is refused before a row is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from finetuner.dialogue.message import Dialogue, Message, Role, RowError
from finetuner.dialogue.template import Template
from finetuner.dialogue.texts import sentinel
from finetuner.errors import ModelError, Problem

THINKING_MARKS = frozenset({"<think>", "</think>"})


@dataclass(frozen=True, slots=True)
class Ends:
    """`usual` ends a turn; `all` are the tokenizer's added tokens, one of which may end a turn with tool calls."""

    usual: str
    all: tuple[str, ...]
    frame: frozenset[str]
    """Added tokens that the template writes around what is said; in a text they could forge a turn."""


def ends_of(template: Template, added: Iterable[str]) -> Ends:
    """What ends a turn in `template`, among the `added` tokens of the tokenizer.

    Raises: ModelError E-TEMPLATE-NO-END, or E-TEMPLATE where the template cannot write two plain turns.
    """
    names = tuple(sorted((name for name in added if not name.isspace()), key=len, reverse=True))
    roles: tuple[Role, ...] = ("user", "assistant", "user", "assistant")
    probe = Dialogue(tuple(Message(role, sentinel(k)) for k, role in enumerate(roles)))
    try:
        text = template.render(probe)
        asked = template.render(Dialogue(probe.messages[:1]), ask=True)
    except RowError as error:
        what = f"the chat template {template.name!r} cannot write a user's and an assistant's turn"
        raise ModelError(Problem("E-TEMPLATE", what, found=error.reason, remedy="name another template")) from error
    if not all(sentinel(number) in text for number in range(len(roles))):
        what = f"the chat template {template.name!r} does not write what is said"
        raise ModelError(Problem("E-TEMPLATE", what, found=repr(text)[:200], remedy="name another template"))
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    after_first = text.partition(sentinel(1))[2].partition(sentinel(2))[0]
    after_last = text.partition(sentinel(3))[2]
    first, last = pattern.search(after_first), pattern.search(after_last)
    if first is None or last is None or first.group() != last.group():
        raise ModelError(
            Problem(
                "E-TEMPLATE-NO-END",
                f"the chat template {template.name!r} writes no token at the end of the assistant's turn",
                found=f"after a turn {after_first!r}, at the end {after_last!r}",
                fits="one of the tokenizer's added tokens after each assistant message, such as its eos_token",
                remedy="name a template that fits the tokenizer, or add the end token to the tokenizer (new_tokens)",
            )
        )
    frame = frozenset(pattern.findall(text) + pattern.findall(asked)) - THINKING_MARKS
    if template.has_marks:
        refuse_marks_without_end(template, probe, text, first.group())
    return Ends(first.group(), names, frame)


def refuse_marks_without_end(template: Template, probe: Dialogue, text: str, end: str) -> None:
    """Refuses `{% generation %}` blocks that leave the end of the turn outside: the model would never learn to stop."""
    for start, stop in template.marks(probe):
        if end not in text[start:stop]:
            raise ModelError(
                Problem(
                    "E-TEMPLATE-NO-END",
                    f"the {{% generation %}} blocks of {template.name!r} leave out the token that ends the turn",
                    found=repr(text[start:stop]),
                    fits=f"a block that ends with {end!r}",
                    remedy="write the end token inside the block",
                )
            )
