"""What was said, by whom, learned or not: the values that a row becomes before any model is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes; `arguments` is a JSON object, whether the row held an object or its text."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `learned` is None where the row does not say: then the assistant's turns are learned, no others."""

    role: Role
    content: str
    learned: bool | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    """Thinking kept apart from the answer (`reasoning_content` of the openai form)."""
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def is_learned(self) -> bool:
        return self.role == "assistant" if self.learned is None else self.learned


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation with the tools that were offered in it, as JSON schemas in OpenAI's form."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text to be continued; every token of it is learned."""

    text: str


RowFunction: TypeAlias = Callable[[Row], Dialogue | Document]


class RowError(ValueError):
    """A row that cannot become a dialogue. The reader of the file adds file and line.

    `kind` is a stable short word by which the data report counts: "role", "empty", "missing-field", ...
    """

    def __init__(self, kind: str, reason: str, found: str = "", fits: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.found, self.fits = kind, reason, found, fits

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str, str]]:
        return type(self), (self.kind, self.reason, self.found, self.fits)
