"""A node of a config: a frozen value that is checked the moment it is made.

- A node that does not fit tells every wrong field at once, with a did-you-mean and the line that made it.
- Under `collecting()` (the loader) a wrong node becomes an `Invalid` value instead of an exception, so that all the
  errors of a file are told in one go.
- Under `at()` (overrides, mmengine files) the place is the one that is given, not the line of code.
- Lists become tuples: a config is a value.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_origin

import pydantic
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from finetuner.config.words import default_of, elsewhere, hint_of_value, hints, words
from finetuner.errors import ConfigError, Problem, nearest

T = TypeVar("T")
_problems: ContextVar[list[Problem] | None] = ContextVar("problems", default=None)
_place: ContextVar[Callable[[str], str] | None] = ContextVar("place", default=None)

WRONG = re.compile("^(Input|String) should (be|have) ")
MACHINERY = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(pydantic.__file__) + os.sep,
    dataclasses.__file__,
    "<frozen",
)
"""Where frames lie that make nodes on behalf of the line that a person wrote."""


class Invalid:
    """Stands where a wrong node would have stood, so that its neighbours can still be checked.

    `replace(invalid, ...)` and `invalid.field` are invalid again: what follows from an error is not told as another.
    """

    __dataclass_fields__: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Invalid:
        if name.startswith("__"):
            raise AttributeError(name)
        return Invalid()


class NodeMeta(type):
    """Checks a node's fields and tells what is wrong as `Problem`s."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        given, problems = bind(cls, args, kwargs)
        sound = {name: value for name, value in given.items() if not holds_invalid(value)}
        whole = not problems and len(sound) == len(given)
        try:
            node = super().__call__(**sound)
        except ValidationError as error:
            problems += mismatches(cls, error)
        except ConfigError as error:
            # What the fields say together counts only when each of them is known.
            if whole:
                problems += [dataclasses.replace(problem, where=problem.where or here()) for problem in error.problems]
        else:
            if whole:
                return node
        return tell(problems)


class Node(metaclass=NodeMeta):
    """The root of all nodes."""

    __slots__ = ()


@dataclass_transform(frozen_default=True)
def node(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, slotted dataclass whose fields pydantic checks strictly; unknown names are refused."""
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return dataclass(frozen=True, slots=True, config=config)(cls)  # type: ignore[return-value]


@contextmanager
def collecting() -> Iterator[list[Problem]]:
    """Gathers the problems of all nodes made inside instead of raising at the first."""
    gathered: list[Problem] = []
    token = _problems.set(gathered)
    try:
        yield gathered
    finally:
        _problems.reset(token)


def tell(problems: Iterable[Problem]) -> Invalid:
    """What stands for a value with these problems: under `collecting()` they are gathered, else they are raised."""
    gathered = _problems.get()
    if gathered is None:
        raise ConfigError(*problems)
    gathered.extend(problems)
    return Invalid()


@contextmanager
def at(place: Callable[[str], str]) -> Iterator[None]:
    """Tells `place(field)` as the place of problems met inside; `place("")` is that of the node as a whole."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


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
    if isinstance(value, Mapping):
        return any(holds_invalid(item) for item in value.values())
    return isinstance(value, Invalid)


def bind(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The values of the fields that `cls` has, and what is wrong with the names and the number of those given."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = dict(zip(fields, map(as_value, args), strict=False))
    problems = []
    if len(args) > len(fields):
        what = f"{cls.__name__} takes {len(fields)} values at most"
        found, remedy = f"{len(args)} values", "give them by name"
        problems.append(Problem("E-CONFIG-VALUE", what, here(), found, ", ".join(fields), remedy))
    for name, value in kwargs.items():
        if name in given:
            what = f"{cls.__name__}.{name} is given twice"
            remedy = f"keep one of the two; by position it is {short(given[name])}"
            problems.append(Problem("E-CONFIG-TWICE", what, here(name), short(value), remedy=remedy))
        elif name in fields:
            given[name] = as_value(value)
        else:
            problems.append(unknown(cls, name, list(fields), value))
    for name, field in fields.items():
        if name not in given and default_of(field) is dataclasses.MISSING:
            fits = f"{name}={words(hints(cls)[name])}"
            problems.append(
                Problem("E-CONFIG-MISSING", f"{cls.__name__} needs {name!r}", here(), "", fits, f"give {name}=...")
            )
    return given, problems


def unknown(cls: type, name: str, fields: list[str], value: Any) -> Problem:
    """The problem of a name that `cls` does not have: what was meant, or which other noun has it."""
    others = [noun for noun in Node.__subclasses__() if noun is not cls and dataclasses.is_dataclass(noun)]
    nouns = {noun.__name__: noun for noun in others}
    best = nearest(name, fields)
    home = "" if best else elsewhere(name, cls, nouns)
    remedy = f"did you mean {best!r}?" if best else home or "remove it"
    what = f"{cls.__name__} has no field {name!r}"
    found = name if isinstance(value, Invalid) else f"{name}={short(value)}"
    return Problem("E-CONFIG-UNKNOWN", what, here(name), found, ", ".join(fields), remedy)


def mismatches(cls: type, error: ValidationError) -> list[Problem]:
    """What is wrong with the values of the fields, at the deepest places that do not fit; names are `bind`'s."""
    by_field: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        if item["type"] not in ("missing", "missing_argument", "missing_keyword_only_argument"):
            by_field.setdefault(str(item["loc"][0]), []).append(item)
    return [problem for name, items in by_field.items() for problem in mismatch(cls, name, items)]


def mismatch(cls: type, name: str, items: list[Any]) -> Iterator[Problem]:
    """The problems of one field from all that pydantic finds in it, one finding for each kind that it could be.

    Pydantic's place of a finding names the kinds, ("targets", "tuple[...]", 1); what is told is targets[1].
    """
    annotation = hints(cls)[name]
    places: dict[tuple[Any, ...], list[Any]] = {}
    for item in items:
        keys = tuple(part for part in item["loc"][1:] if isinstance(part, int) or is_mapping(annotation))
        places.setdefault(keys, []).append(item)
    depth = max(map(len, places))
    for keys, found in places.items():
        if len(keys) < depth:
            continue
        messages = dict.fromkeys(WRONG.sub("", item["msg"]).replace("instance of ", "") for item in found)
        fits = " or ".join(messages) if keys else words(annotation)
        what = f"{cls.__name__}.{name}{''.join(f'[{key!r}]' for key in keys)} does not fit"
        value = found[0]["input"]
        remedy = hint_of_value(value, annotation) or f"change {name} to what fits"
        yield Problem("E-CONFIG-VALUE", what, here(name), short(value), fits, remedy)


def is_mapping(annotation: Any) -> bool:
    """Whether a field takes a mapping; then the names in a finding's place are keys of the value."""
    return get_origin(annotation) is Mapping


def short(value: Any) -> str:
    """`repr(value)` on one line, cut at 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def here(field: str = "") -> str:
    """Where the node that is being made was written."""
    place = _place.get()
    return caller() if place is None else place(field)


def caller() -> str:
    """file:line of the innermost frame outside the config machinery, where a node was written."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(MACHINERY):
            return spot(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def spot(file: str | os.PathLike[str], line: int | None = None) -> str:
    """file:line, the file from here when it lies below the current folder."""
    path, folder = os.fspath(file), os.getcwd() + os.sep
    path = path.removeprefix(folder)
    return path if line is None else f"{path}:{line}"
