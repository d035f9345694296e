"""A run as data: every field, nodes as {"type": "LoRA", ...}, functions by name. Reading it executes nothing.

Run -> to_json -> config.json -> from_json -> Run
differences(then, now) -> ["optim.lr: 0.0002 -> 0.0001", ...]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_origin

from finetuner.config.function import built_in, function_reference
from finetuner.config.mask import mask
from finetuner.config.node import Node, at, collecting, short
from finetuner.config.run import Run
from finetuner.config.values import nouns
from finetuner.config.words import hints, is_function, kinds
from finetuner.errors import ConfigError, Problem, nearest

Function = Callable[..., Any]


def to_json(run: Run) -> dict[str, Any]:
    """Every field of the run as plain data, its secrets masked."""
    return plain(run)  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """`value` as JSON has it; what JSON does not have is refused."""
    match value:
        case Node():
            names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
            return {"type": type(value).__name__, **{name: plain(getattr(value, name)) for name in names}}
        case tuple() | list():
            return [plain(item) for item in value]
        case Mapping():
            return {str(key): plain(item) for key, item in mask(value).items()}
        case None | bool() | int() | float() | str():
            return mask(value)
        case _ if callable(value):
            return function_reference(value)
        case _:
            what = f"a config holds plain values, not a {type(value).__name__}"
            raise ConfigError(Problem("E-CONFIG-WRITE", what, found=short(value), remedy="write it as plain data"))


def from_json(data: Mapping[str, Any], *, functions: Callable[[str], Function] | None = None) -> Run:
    """The run that `to_json` wrote.

    Row functions that come with the package are found by name. Any other is given by `functions(reference)`; without
    it they are refused, for finding one executes the file that it stands in.
    """
    with collecting() as problems:
        try:
            run = node_of(data, "config", functions)
        except ConfigError as error:
            raise ConfigError(*dict.fromkeys([*problems, *error.problems])) from None
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if not isinstance(run, Run):
        raise ConfigError(
            Problem(
                "E-CONFIG-RUN",
                "the data is not a Run",
                "config",
                type(run).__name__,
                "Run",
                "take the config.json of a run's folder",
            )
        )
    return run


def node_of(data: Mapping[str, Any], path: str, functions: Callable[[str], Function] | None) -> Any:
    """The node that {"type": ..., field: ...} says."""
    name = data.get("type")
    if not isinstance(name, str) or name not in nouns():
        best = nearest(str(name), nouns())
        remedy = f"did you mean {best!r}?" if best else "take the config.json of a run's folder, as it was written"
        what = "a node of the data names no noun of a config"
        raise ConfigError(Problem("E-CONFIG-UNKNOWN", what, f"{path}.type", short(name), ", ".join(nouns()), remedy))
    noun = nouns()[name]
    types = hints(noun)
    values = {
        field: value_of(item, types.get(field, Any), f"{path}.{field}", functions)
        for field, item in data.items()
        if field != "type"
    }
    with at(lambda field: f"{path}.{field}" if field else path):
        return noun(**values)


def value_of(value: Any, annotation: Any, path: str, functions: Callable[[str], Function] | None) -> Any:
    """A field's value; a mapping stays one only where the field takes a mapping."""
    if isinstance(value, str) and any(map(is_function, kinds(annotation))):
        return function_of(value, path, functions)
    match value:
        case Mapping() if any(get_origin(kind) is Mapping for kind in kinds(annotation)):
            return dict(value)
        case Mapping():
            return node_of(value, path, functions)
        case list():
            return tuple(value_of(item, Any, f"{path}.{number}", functions) for number, item in enumerate(value))
        case _:
            return value


def function_of(reference: str, path: str, functions: Callable[[str], Function] | None) -> Function:
    """The row function of this name."""
    for function in built_in().values():
        if function_reference(function) == reference:
            return function
    if functions is not None:
        return functions(reference)
    what = "the row function is not one of finetuner's, and none is taken from data"
    remedy = "give the run's own config file"
    raise ConfigError(Problem("E-CONFIG-FUNCTION", what, path, reference, ", ".join(built_in()), remedy))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What changed from `a` to `b`, key by key: "optim.lr: 0.0002 -> 0.0001"."""
    return list(changes(a, b, ""))


def changes(a: Any, b: Any, path: str) -> Iterator[str]:
    """The lines of `differences`, below `path`; a node of another type is told whole."""
    match a, b:
        case Mapping(), Mapping() if a.get("type") == b.get("type"):
            for key in {**a, **b}:
                below = f"{path}.{key}" if path else str(key)
                if key not in a:
                    yield f"{below}: (absent) -> {told(b[key])}"
                elif key not in b:
                    yield f"{below}: {told(a[key])} -> (absent)"
                else:
                    yield from changes(a[key], b[key], below)
        case list(), list() if len(a) == len(b):
            for number, (one, other) in enumerate(zip(a, b)):
                yield from changes(one, other, f"{path}.{number}")
        case _ if a != b or type(a) is not type(b):
            yield f"{path}: {told(a)} -> {told(b)}"


def told(value: Any) -> str:
    """A value on one line: {"type": "Steps", "count": 5} -> Steps(count=5)."""
    match value:
        case {"type": str() as name, **values}:
            return f"{name}({', '.join(f'{key}={told(item)}' for key, item in values.items())})"
        case list():
            return f"[{', '.join(map(told, value))}]"
        case _:
            return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
