"""The fields of a row, each read once and refused with its place when it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from finetuner.dialogue.message import Row, RowError

T = TypeVar("T")


def object_of(value: Any) -> Row:
    """`value`, which must be a JSON object."""
    if not isinstance(value, Mapping):
        raise RowError("not-an-object", "the row is not an object", found=short(value), fits="{...}")
    return value


def unmisspelt(row: Row, *, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuses a row without a needed field, or with an optional one under a name that is nearly right."""
    needed, optional = tuple(needed), tuple(optional)
    others: list[str] | None = None
    for name in (*needed, *optional):
        if name in row:
            continue
        if others is None:
            others = [key for key in row if isinstance(key, str) and key not in needed and key not in optional]
        near = get_close_matches(name, others, n=1, cutoff=0.6 if name in needed else 0.8) if others else []
        if near:
            reason = f"there is no field {name!r}, but {near[0]!r}"
            raise RowError("missing-field", reason, found=near[0], fits=f"did you mean {name!r}?")
        if name in needed:
            reason = f"there is no field {name!r}"
            raise RowError("missing-field", reason, found=short(list(row)), fits=", ".join(needed))


def absent(row: Row, name: str) -> bool:
    """Whether a field is not there or null, which is how tables say that it is not there."""
    return row.get(name) is None


def text_of(row: Row, name: str, label: str = "") -> str:
    """A field's text; content parts of kind text are joined."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    label = label or name
    if value is None:
        if name not in row:
            raise RowError("missing-field", f"there is no field {label!r}", found=short(list(row)), fits=label)
        raise RowError("empty", f"{label!r} is null", found="null", fits="a text")
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return "".join(part_of(part, label) for part in value)
    raise RowError("type", f"{label!r} is not a text", found=short(value), fits="a text")


def part_of(part: Any, label: str) -> str:
    """The text of one of a message's content parts."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return text_of(part, "text", f"{label}.text")
    if isinstance(kind, str) and "image" in kind:
        raise RowError("image", f"{label!r} holds an image", found=short(kind), fits="texts only")
    raise RowError(
        "type", f"{label!r} holds a part that is no text", found=short(part), fits='{"type": "text", "text": ""}'
    )


def needed_text(row: Row, name: str, label: str = "") -> str:
    """A field's text, which must say something."""
    text = text_of(row, name, label)
    if not text.strip():
        raise RowError("empty", f"{label or name!r} is empty", found=repr(text), fits="a text")
    return text


def optional_text(row: Row, name: str) -> str | None:
    """A field's text, or None where it is absent or null."""
    return None if absent(row, name) else text_of(row, name)


def needed_list(row: Row, name: str) -> Sequence[Any]:
    """A field's list, which must hold something (a history may be empty)."""
    value = row.get(name)
    if not isinstance(value, list | tuple):
        raise RowError("type", f"{name!r} is not a list", found=short(value), fits="[...]")
    if not value and name != "history":
        raise RowError("empty", f"{name!r} is an empty list", found="[]", fits="at least a question and an answer")
    return value


def loss_of(given: Row, role: str) -> bool | None:
    """Whether a message is learned, where it says so: "loss": true | false, or "weight": 0 | 1."""
    found: dict[str, bool] = {}
    for name in ("loss", "weight"):
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError("type", f"{name!r} is neither 0 nor 1", found=short(value), fits="true, false, 0 or 1")
        found[name] = bool(value)
    if len(set(found.values())) > 1:
        raise RowError("type", "'loss' and 'weight' say different things", found=short(found), fits="one of them")
    learned = next(iter(found.values()), None)
    if learned and role != "assistant":
        raise RowError("role", "only the assistant's messages can be learned", found=role, fits="assistant")
    return learned


def in_turn(name: str, number: int, read: Callable[[Row], T], given: Any) -> T:
    """`read(given)`, whose errors tell that it is number `number` of the list `name`."""
    try:
        return read(object_of(given))
    except RowError as error:
        raise RowError(error.kind, f"{name}[{number}]: {error.reason}", error.found, error.fits) from None


def short(value: Any) -> str:
    """`repr(value)`, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
