"""What went wrong while a config file was executed, as a `ConfigError` with file:line."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import finetuner
from finetuner.config import files
from finetuner.config.node import Node, short, spot
from finetuner.config.run import Run
from finetuner.errors import ConfigError, Problem, nearest


class TooLong(BaseException):
    """Raised inside a config file whose time is up; not an Exception, so that the file does not swallow it."""


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Tells whatever the config file raises as a ConfigError; Ctrl-C stays what it is."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise ConfigError(problem(error, file)) from error


def problem(error: BaseException, file: Path) -> Problem:
    """What the exception says, at the innermost line of a config file that it came through."""
    where = line_of(error, file)
    match error:
        case SyntaxError():
            return syntax(error, where)
        case ModuleNotFoundError():
            return missing_module(str(error.name), where)
        case ImportError():
            return missing_name(error, where)
        case SystemExit():
            what, remedy = "config ended the process", "a config describes a run: remove the exit"
            return Problem("E-CONFIG-EXIT", what, where, f"sys.exit({error.code!r})", remedy=remedy)
        case TooLong():
            what, remedy = f"config did not end within {error}", "do slow work in a row function or before, in a file"
            return Problem("E-CONFIG-TIME", what, where, remedy=remedy)
        case _:
            what = f"config raised {type(error).__name__} at line {where.rpartition(':')[2]}"
            return Problem("E-CONFIG-RAISED", what, where, str(error), remedy=remedy_of(error))


def line_of(error: BaseException, file: Path) -> str:
    """file:line of the innermost frame that belongs to a config file."""
    lines = [
        spot(frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_config(frame.f_globals, frame.f_code.co_filename)
    ]
    return lines[-1] if lines else spot(file)


def is_config(names: Mapping[str, Any], file: str) -> bool:
    """Whether a frame runs a config file: a module of ours, or what mmengine executes, which has no module name."""
    of_mmengine = "LazyObject" in names and names["__file__"] == file
    return of_mmengine or str(names.get("__name__", "")).startswith(files.PREFIX)


def syntax(error: SyntaxError, where: str) -> Problem:
    """The line that is no Python, with a caret below the place."""
    place = spot(error.filename, error.lineno) if error.filename else where
    text = (error.text or "").rstrip("\n")
    # Below `found:` of the printed problem, which takes ten places.
    caret = "\n" + " " * (10 + max((error.offset or 1) - 1, 0)) + "^" if text else ""
    remedy = "write it as Python; the place is often just before the caret"
    return Problem("E-CONFIG-SYNTAX", f"the config is not Python: {error.msg}", place, text + caret, remedy=remedy)


def missing_module(name: str, where: str) -> Problem:
    """The package or the config file that is imported and not there."""
    if not name.startswith(files.PREFIX):
        top = name.partition(".")[0]
        beside = Path(where.rpartition(":")[0]).with_name(top + ".py").is_file()
        remedy = f"write `from .{top} import ...` for the file beside this one" if beside else f"pip install {top}"
        return Problem("E-CONFIG-IMPORT", f"the package {top!r} is not installed", where, f"import {name}", "", remedy)
    path = files.path_of(name)
    others = sorted(file.stem for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
    best = nearest(path.name, others)
    what = f"there is no config file {path.name}.py to import"
    remedy = f"did you mean .{best}?" if best else "write the name of a file that is there, or copy it beside this one"
    return Problem("E-CONFIG-SIBLING", what, where, spot(path) + ".py", ", ".join(others), remedy)


def missing_name(error: ImportError, where: str) -> Problem:
    """The name that a module does not have."""
    match = re.match("cannot import name '([^']+)'", error.msg)
    if match is None or error.name not in sys.modules:
        return Problem("E-CONFIG-IMPORT", "an import fails", where, error.msg, remedy="see `finetuner env`")
    name, module = match.group(1), sys.modules[error.name]
    names = [known for known in dir(module) if not known.startswith("_")]
    known = spot(str(module.__file__)) if error.name.startswith(files.PREFIX) else error.name
    best = nearest(name, names)
    fits = ", ".join(finetuner.__all__) if error.name == "finetuner" else ""
    remedy = f"did you mean {best!r}?" if best else f"import a name that {known} defines"
    return Problem("E-CONFIG-IMPORT", f"{known} has no {name!r}", where, name, fits, remedy)


def remedy_of(error: BaseException) -> str:
    """What most likely mends an exception of the file's own code."""
    if isinstance(error, NameError):
        name = str(error.name)
        best = name if name in finetuner.__all__ else nearest(name, finetuner.__all__)
        if best:
            return f"from finetuner import {best}"
    return "mend the line; --debug shows the whole traceback"


def nothing(file: Path, names: Mapping[str, Any]) -> Problem:
    """The problem of a file without the variable `config`."""
    fits = "config = Run(model=..., data=..., optim=..., batch=..., until=...)"
    runs = [name for name, value in names.items() if isinstance(value, Run)]
    best = runs[-1] if runs else nearest("config", [name for name in names if not name.startswith("__")])
    remedy = f"did you mean config = {best}?" if best else "give the run that name; `finetuner list` shows ready ones"
    found = "an empty file" if not names else ", ".join(n for n in names if not n.startswith("__"))
    return Problem("E-CONFIG-NONE", "the file defines no `config`", spot(file), short_names(found), fits, remedy)


def short_names(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."


def no_run(file: Path, value: Any) -> Problem:
    """The problem of a `config` that is something else."""
    fits, remedy = "a Run, or a function without arguments that returns one", "write config = Run(...)"
    match value:
        case Node():
            found = f"a {type(value).__name__}"
            remedy = f"put it into a Run: config = Run(..={type(value).__name__}(...), ...)"
        case type():
            found, remedy = f"the class {value.__name__}", f"make one: {value.__name__}(...)"
        case dict():
            found, remedy = "a dict", "write Run(...), or for mmengine's notation: model = dict(type=CausalLM, ...)"
        case None:
            found, remedy = "None", "write config = Run(...); a function `config` must return it"
        case _:
            found = f"{short(value)}, a {type(value).__name__}"
    return Problem("E-CONFIG-RUN", "`config` is not a Run", spot(file), found, fits, remedy)
