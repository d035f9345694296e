"""A run written as a config file that loads to an equal run: what differs from the defaults, ready to be edited.

Secrets are masked (config/mask.py). config/record.py writes a run as data; both are meant to be imported from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.config.function import function_reference
from finetuner.config.mask import mask
from finetuner.config.node import Node, short
from finetuner.config.record import differences, from_json, to_json
from finetuner.config.run import Run
from finetuner.config.values import nouns
from finetuner.config.words import default_of
from finetuner.errors import ConfigError, Problem

__all__ = ["differences", "from_json", "to_json", "to_source"]

WIDTH = 120
BY_NAME = ("Run", "AdamW", "BatchSize")
"""Nouns whose fields are all written by name."""


def to_source(run: Run, *, about: str = "A run as it was resolved.") -> str:
    """A config file that loads to a run equal to `run`, its secrets masked."""
    used: set[str] = set()
    functions: dict[str, str] = {}
    body = expression(run, 0, len("config = "), used, functions)
    lines = [f'"""{about}"""', "", *imports(used, functions), "", f"config = {body}", ""]
    return "\n".join(lines)


def imports(used: set[str], functions: Mapping[str, str]) -> Iterator[str]:
    """The lines that bring the nouns and the row functions; `functions` is name -> reference."""
    outside = {name: ref for name, ref in functions.items() if not importable(ref)}
    yield wrapped(f"from finetuner import {', '.join(sorted(used))}")
    if outside:
        yield "from finetuner.config.load import resolve"
    for name, reference in sorted(functions.items()):
        if name not in outside:
            module, _, original = reference.partition(":")
            alias = original if original == name else f"{original} as {name}"
            yield f"from {module} import {alias}"
    for name, reference in sorted(outside.items()):
        yield ""
        yield f"{name} = resolve({quoted(reference)})"


def importable(reference: str) -> bool:
    """Whether `from module import name` brings the function: not from a config file, nor a method of a class."""
    module, _, name = reference.rpartition(":")
    return not module.endswith(".py") and "." not in name


def wrapped(line: str) -> str:
    """An import line, in brackets when it is long."""
    if len(line) <= WIDTH:
        return line
    head, _, names = line.partition(" import ")
    return "\n".join([f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"])


def expression(value: Any, indent: int, column: int, used: set[str], functions: dict[str, str]) -> str:
    """`value` as Python: on one line when it fits behind `column`, else an item a line, `indent` spaces deep."""

    def inner(item: Any, width: int) -> str:
        return expression(item, indent + 4, indent + 4 + width, used, functions)

    match value:
        case Node():
            used.add(type(value).__name__)
            items = [f"{label}{inner(item, len(label))}" for label, item in arguments(value)]
            opening, closing = f"{type(value).__name__}(", ")"
        case tuple() | list():
            items = [inner(item, 0) for item in value]
            opening, closing = "()" if isinstance(value, tuple) else "[]"
            if isinstance(value, tuple) and len(value) == 1:
                closing = ",)"
        case Mapping():
            items = [f"{inner(key, 0)}: {inner(item, len(repr(key)) + 2)}" for key, item in mask(value).items()]
            opening, closing = "{", "}"
        case str():
            return quoted(mask(value))
        case None | bool() | int() | float():
            return repr(value)
        case _ if callable(value):
            return name_for(function_reference(value), functions)
        case _:
            what = f"a config holds plain values, not a {type(value).__name__}"
            raise ConfigError(Problem("E-CONFIG-WRITE", what, found=short(value), remedy="write it as plain data"))
    line = f"{opening}{', '.join(items)}{closing}"
    if isinstance(value, Run) or "\n" in line or column + len(line) + 1 > WIDTH:
        separator = f",\n{' ' * (indent + 4)}"
        return f"{opening}\n{' ' * (indent + 4)}{separator.join(items)},\n{' ' * indent}{closing.lstrip(',')}"
    return line


def arguments(value: Node) -> Iterator[tuple[str, Any]]:
    """("rank=", 64), ...: the fields that differ from their defaults; the first, when it has none, without its name."""
    for number, field in enumerate(dataclasses.fields(value)):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        default = default_of(field)
        required = default is dataclasses.MISSING
        bare = number == 0 and required and type(value).__name__ not in BY_NAME
        if required or item != default:
            yield ("" if bare else f"{field.name}="), item


def quoted(text: str) -> str:
    """`repr(text)` in double quotes where that needs no escapes."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain and "\\'" not in plain else plain


def name_for(reference: str, functions: dict[str, str]) -> str:
    """The name by which the source calls a function; two of one name from two places get numbers."""
    original = reference.rpartition(":")[2].rpartition(".")[2]
    taken = {*nouns(), "config", "resolve"}
    name, number = original, 2
    while name in taken or functions.setdefault(name, reference) != reference:
        name, number = f"{original}_{number}", number + 1
    return name
