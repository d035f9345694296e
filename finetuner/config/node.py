"""A node of a config: a frozen value that is checked the moment it is made.

- A node that does not fit tells every wrong field at once, with a did-you-mean and the line that made it.
- Under `collecting()` (the loader) a wrong node becomes an `Invalid` value instead of an exception, so that all the
  errors of a file are told in one go.
- Lists become tuples: a config is a value.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from finetuner.errors import ConfigError, Problem, nearest

T = TypeVar("T")
_problems: ContextVar[list[Problem] | None] = ContextVar("problems", default=None)


class Invalid:
    """Stands where a wrong node would have stood, so that its neighbours can still be checked."""


class NodeMeta(type):
    """Checks a node's fields and tells what is wrong as `Problem`s."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        given = dict(zip(fields, map(as_value, args), strict=False)) | {k: as_value(v) for k, v in kwargs.items()}
        surplus = tuple(args[len(fields) :])
        broken = {name for name, value in given.items() if holds_invalid(value)}
        problems = []
        try:
            node = super().__call__(*surplus, **{k: v for k, v in given.items() if k not in broken})
        except ValidationError as error:
            found = [item for item in error.errors() if not (item["loc"] and item["loc"][0] in broken)]
            problems = list({str(p): p for p in (describe(cls, item, fields) for item in found)}.values())
        except ConfigError as error:
            where = caller()
            problems = [dataclasses.replace(p, where=p.where or where) for p in error.problems]
        else:
            if not broken:
                return node
        gathered = _problems.get()
        if gathered is None:
            raise ConfigError(*problems)
        gathered.extend(problems)
        return Invalid()


class Node(metaclass=NodeMeta):
    """The root of all nodes."""

    __slots__ = ()


@dataclass_transform(frozen_default=True)
def node(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, slotted dataclass whose fields pydantic checks strictly; unknown names are refused."""
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return dataclass(frozen=True, slots=True, config=config)(cls)


@contextmanager
def collecting() -> Iterator[list[Problem]]:
    """Gathers the problems of all nodes made inside instead of raising at the first."""
    gathered: list[Problem] = []
    token = _problems.set(gathered)
    try:
        yield gathered
    finally:
        _problems.reset(token)


def refuse(code: str, what: str, *, found: str = "", fits: str = "", remedy: str = "") -> None:
    """Raises the problem of a node whose fields fit alone but not together (for `__post_init__`)."""
    raise ConfigError(Problem(code, what, found=found, fits=fits, remedy=remedy))


def as_value(value: Any) -> Any:
    """`value` with lists made tuples, all the way down."""
    if isinstance(value, list | tuple):
        return tuple(as_value(item) for item in value)
    return value


def holds_invalid(value: Any) -> bool:
    """Whether `value` is or contains an `Invalid`."""
    if isinstance(value, tuple):
        return any(holds_invalid(item) for item in value)
    return isinstance(value, Invalid)


def describe(cls: type, item: Any, fields: list[str]) -> Problem:
    """One of pydantic's findings as a `Problem` at the line of the config that made the node."""
    name, where = ".".join(str(part) for part in item["loc"]), caller()
    match item["type"]:
        case "unexpected_keyword_argument":
            best = nearest(name, fields)
            fits = ", ".join(fields)
            remedy = f"did you mean {best!r}?" if best else "remove it"
            return Problem("E-CONFIG-UNKNOWN", f"{cls.__name__} has no field {name!r}", where, name, fits, remedy)
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return Problem("E-CONFIG-MISSING", f"{cls.__name__} needs {name!r}", where, remedy=f"give {name}=...")
        case "unexpected_positional_argument":
            return Problem("E-CONFIG-VALUE", f"{cls.__name__} takes {len(fields)} values", where, repr(item["input"]))
        case _:
            what = f"{cls.__name__}.{name} does not fit"
            return Problem("E-CONFIG-VALUE", what, where, short(item["input"]), item["msg"].removeprefix("Input "))


def short(value: Any) -> str:
    """`repr(value)` on one line, cut at 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def caller() -> str:
    """file:line of the innermost frame outside this package's config machinery, where a node was written."""
    own = os.path.dirname(__file__)
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith((own, "<")) and os.path.basename(file) != "dataclasses.py" and "pydantic" not in file:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
