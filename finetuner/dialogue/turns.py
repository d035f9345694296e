"""Who may speak after whom: the order that chat templates are made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from finetuner.dialogue.fields import short
from finetuner.dialogue.message import Message, Row, RowError
from finetuner.errors import nearest

R = TypeVar("R", bound=str)

AFTER: Mapping[str, tuple[str, ...]] = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool calls": ("tool",),
    "tool": ("tool", "assistant", "user"),
}


def role_of(given: Row, field: str, roles: Mapping[str, R]) -> R:
    """The role that a message's field names, with a did-you-mean."""
    name = given[field]
    if isinstance(name, str) and name in roles:
        return roles[name]
    best = nearest(name, roles) if isinstance(name, str) else ""
    fits = f"did you mean {best!r}?" if best else ", ".join(roles)
    raise RowError("role", f"there is no role {short(name)}", found=short(name), fits=fits)


def ordered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """`messages`, if each may follow the one before it and the assistant speaks.

    system? user assistant user assistant ..., and after tool calls tool ... assistant.
    """
    before = "the start"
    for number, message in enumerate(messages):
        if message.role not in AFTER[before]:
            reason = f"message {number + 1} is the {message.role}'s, after {before}"
            raise RowError("order", reason, found=message.role, fits=" or ".join(AFTER[before]))
        before = "assistant with tool calls" if message.tool_calls else message.role
    if not any(message.role == "assistant" for message in messages):
        raise RowError(
            "no-assistant", "the assistant says nothing", found=short([m.role for m in messages]), fits="assistant"
        )
    return tuple(messages)
