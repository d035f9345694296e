"""A config file, executed, becomes a `Run`.

    file -> module (config/files.py) -> its variable `config` -> Run -> overrides (config/overrides.py) -> Run

- The file is the user's program: what it may do is not limited, but it has 30 seconds.
- Whatever goes wrong in it is a `ConfigError` with file:line; all wrong nodes of a file are told at once.
- Files in mmengine's notation are read by config/mm.py into the same nodes.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from finetuner.config import files, mishap, mm
from finetuner.config.function import check_functions, function_reference, resolve
from finetuner.config.mask import secret_lines
from finetuner.config.node import Invalid, collecting, spot
from finetuner.config.overrides import apply
from finetuner.config.ready import ready
from finetuner.config.run import Run
from finetuner.errors import ConfigError, Problem, nearest
from finetuner.runtime.log import warn

__all__ = ["Loaded", "function_reference", "load", "resolve"]

LIMIT_S = 30.0
"""Seconds that a config file may take."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run and the file that it came from."""

    run: Run
    path: Path
    source: str
    """The file's text."""
    name: str
    """What the run is called: the file's name without its ending."""


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Loaded:
    """The run that a config file describes, with `overrides` such as "optim.lr=1e-5" applied.

    Raises: ConfigError with everything that is wrong in the file, else with everything wrong in the overrides.
    """
    file = find(os.fspath(path))
    source = read(file)
    for line in secret_lines(source):
        warn(f"{spot(file, line)}: this looks like a secret; keep it in the environment, such as HF_TOKEN")
    # What a config prints is no part of the command's own output, which another program may read.
    with mishap.told(file), time_limit(), redirect_stdout(sys.stderr):
        run = mm.run_of(file, source) if mm.is_mmengine(source) else run_of(file)
    check_functions(run, spot(file))
    return Loaded(apply(run, overrides), file, source, file.stem)


def find(path: str) -> Path:
    """The config file that `path` names: a file, else a ready config."""
    if os.path.isdir(path):
        remedy = f"give the file: {os.path.join(path, 'NAME.py')}"
        raise ConfigError(Problem("E-CONFIG-PATH", "a config is a file, not a folder", path, "a folder", "", remedy))
    if path.endswith(".py") and os.path.isfile(path):
        return Path(os.path.abspath(path))
    known = ready()
    if path.removesuffix(".py") in known:
        return known[path.removesuffix(".py")]
    name = os.path.basename(path)
    if os.path.exists(path):
        fits = "a Python file, NAME.py, whose variable `config` is a Run"
        remedy = "give the .py file; see `finetuner list` for ready ones"
        raise ConfigError(Problem("E-CONFIG-PATH", "a config is a Python file", path, name, fits, remedy))
    folder = os.path.dirname(path) or "."
    beside = [entry for entry in os.listdir(folder) if entry.endswith(".py")] if os.path.isdir(folder) else []
    best = nearest(path.removesuffix(".py"), known) or nearest(name, beside)
    what = "no such config file, and no ready config of this name"
    fits = ", ".join(ready_like(name.removesuffix(".py"), known)) or "a path, or a name of `finetuner list`"
    remedy = f"did you mean {best}?" if best else "see `finetuner list` for ready configs"
    raise ConfigError(Problem("E-CONFIG-PATH", what, path, name, fits, remedy))


def ready_like(name: str, known: Iterable[str]) -> list[str]:
    """The names of the ready configs that come nearest."""
    return get_close_matches(name, list(known), n=5, cutoff=0.4)


def read(file: Path) -> str:
    """The file's text; what cannot be read is told."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem(
                "E-CONFIG-READ",
                "the config file cannot be read",
                spot(file),
                str(error),
                "a text in UTF-8",
                "save it as UTF-8, readable by you",
            )
        ) from error
    if not source.strip():
        raise ConfigError(mishap.nothing(file, {}))
    return source


def run_of(file: Path) -> Run:
    """The value of `config` in the file, or what it returns."""
    before = files.loaded()
    if any(changed(module) for module in before.values()):
        files.forget(before)
        before = {}
    run: Run | Invalid = Invalid()
    with collecting() as problems:
        try:
            run = value_of(file)
        except ConfigError:
            # After a wrong node, another error is most likely its consequence.
            if not problems:
                raise
        finally:
            if problems or isinstance(run, Invalid):
                files.forget(files.loaded().keys() - before.keys())
    if problems or isinstance(run, Invalid):
        raise ConfigError(*dict.fromkeys(problems))
    return run


def changed(module: ModuleType) -> bool:
    """Whether the file of a loaded module is no longer what was executed."""
    file = Path(str(module.__file__))
    return not file.is_file() or file.read_bytes() != module.__dict__["__source__"]


def value_of(file: Path) -> Run | Invalid:
    """Executes the file and takes its `config`."""
    with mishap.told(file):
        module = importlib.import_module(files.module_name(file))
        if "config" not in module.__dict__:
            raise ConfigError(mishap.nothing(file, module.__dict__))
        config = module.__dict__["config"]
        if inspect.isfunction(config):
            config = called(config)
    if not isinstance(config, Run | Invalid):
        raise ConfigError(mishap.no_run(file, config))
    return config


def called(config: Callable[..., Any]) -> Any:
    """What the function `config` returns."""
    parameters = inspect.signature(config).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        what = "the function `config` is called without arguments"
        where = spot(config.__code__.co_filename, config.__code__.co_firstlineno)
        found, remedy = f"config({', '.join(needed)})", f"give {', '.join(needed)} a default"
        raise ConfigError(Problem("E-CONFIG-RUN", what, where, found, "def config() -> Run", remedy))
    return config()


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises `mishap.TooLong` inside after LIMIT_S seconds; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise mishap.TooLong(f"{LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
