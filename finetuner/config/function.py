"""Row functions by name: what a run's folder says of a function, and what a worker process imports it by.

    alpaca                      <-> "finetuner.dialogue.rows:alpaca"
    a function of a config file <-> "/home/ada/run.py:my_rows"

A function without such a name, a lambda say, is refused.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from finetuner.config import files
from finetuner.config.node import Node, short, spot
from finetuner.dialogue import rows
from finetuner.errors import ConfigError, Problem, nearest

Function = Callable[..., Any]
FITS = "a function defined with `def` at the top of a file"


def built_in() -> dict[str, Function]:
    """The row functions that come with the package, by name."""
    own = inspect.getmembers(rows, inspect.isfunction)
    return {name: function for name, function in own if function.__module__ == rows.__name__ and name[0] != "_"}


def function_reference(function: Function) -> str:
    """The name by which any process can find the function.

    Raises: ConfigError for one that has none: a lambda, an inner function, a `partial`, one of a script.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or name is None or "<" in name or module == "__main__":
        raise ConfigError(no_reference(function))
    path = f"{files.path_of(module)}.py" if module.startswith(files.PREFIX) else module
    if found_in(sys.modules.get(module), name) is not function:
        raise ConfigError(no_reference(function))
    return f"{path}:{name}"


def resolve(reference: str) -> Function:
    """The function that "path/to/config.py:name", "module:name" or "package.module.name" says; executes its file."""
    place, colon, name = reference.rpartition(":")
    if not colon:
        place, _, name = reference.rpartition(".")
    fits = '"package.module:function", "path/to/file.py:function", or ' + ", ".join(built_in())
    if not place or not name:
        best = nearest(reference, built_in())
        remedy = f"did you mean {best}?" if best else "give one of these forms"
        raise ConfigError(Problem("E-CONFIG-FUNCTION", "no such row function", "", reference, fits, remedy))
    try:
        module = importlib.import_module(files.module_name(Path(place)) if place.endswith(".py") else place)
    except ImportError as error:
        remedy = f"check the name; {place} must be there, and importable from here"
        raise ConfigError(Problem("E-CONFIG-FUNCTION", f"{error}", "", reference, fits, remedy)) from error
    function = found_in(module, name)
    if not callable(function):
        best = nearest(name, [n for n, value in vars(module).items() if inspect.isfunction(value)])
        what, remedy = f"{place} has no function {name!r}", f"did you mean {best}?" if best else f"define it in {place}"
        raise ConfigError(Problem("E-CONFIG-FUNCTION", what, "", reference, fits, remedy))
    return function  # type: ignore[no-any-return]


def found_in(module: Any, name: str) -> Any:
    """The object that a dotted name means in a module; None when there is none."""
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def no_reference(function: Function) -> Problem:
    """The problem of a function that worker processes cannot import."""
    code = getattr(function, "__code__", None)
    where = spot(code.co_filename, code.co_firstlineno) if code else ""
    what = "a row function must be importable by its name, for worker processes read the rows"
    return Problem("E-CONFIG-FUNCTION", what, where, short(function), FITS, "write it as such a function")


def check_functions(value: Any, where: str) -> None:
    """Refuses a run that holds a function which other processes cannot find."""
    if isinstance(value, Node):
        for field in fields(value):  # type: ignore[arg-type]
            check_functions(getattr(value, field.name), where)
    elif isinstance(value, tuple):
        for item in value:
            check_functions(item, where)
    elif callable(value):
        try:
            function_reference(value)
        except ConfigError as error:
            raise ConfigError(*(replace(problem, where=problem.where or where) for problem in error.problems)) from None
