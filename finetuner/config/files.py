"""Config files as modules: `finetuner.config.files.home.ada.run` is /home/ada/run.py.

- A folder is the package of the files in it, so `from .sibling import config` and `from ..base import model` work.
- Names are stable: a function of a config file can be pickled here and imported by a worker process, for importing
  this package is what installs the finder.
- Files that import one another in a circle are told as the circle.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from finetuner.config.node import spot
from finetuner.errors import ConfigError, Problem

__path__: list[str] = []
PREFIX = __name__ + "."
_executing: ContextVar[tuple[str, ...]] = ContextVar("executing", default=())


class Finder:
    """Finds the modules below this package, and no others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        stem = path_of(name)
        file = stem.with_name(stem.name + ".py")
        if file.is_file():
            # A loader is what has these two methods; typeshed asks for the deprecated load_module besides.
            spec = ModuleSpec(name, FileLoader(file), origin=str(file))  # type: ignore[arg-type]
            spec.has_location = True
            if stem.is_dir():
                spec.submodule_search_locations = [str(stem)]
            return spec
        if stem.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(stem)]
            return spec
        return None


class FileLoader:
    """Executes one config file; its text stays at the module as `__source__`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        outer = _executing.get()
        token = _executing.set((*outer, module.__name__))
        try:
            # Bytes, so that Python itself honours the encoding line and tells what is not UTF-8.
            source = self.file.read_bytes()
            module.__dict__["__source__"] = source
            exec(compile(source, str(self.file), "exec", dont_inherit=True), module.__dict__)
        except ImportError as error:
            chain = _executing.get()
            if error.name in chain:
                raise circle((*chain[chain.index(error.name) :], error.name)) from error
            raise
        finally:
            _executing.reset(token)

    def get_source(self, name: str) -> str:
        return self.file.read_text(encoding="utf-8")


def module_name(file: Path) -> str:
    """The name under which `file` is imported."""
    parts = Path(os.path.abspath(file)).with_suffix("").parts[1:]
    return PREFIX + ".".join(part.replace("%", "%25").replace(".", "%2E") for part in parts)


def path_of(name: str) -> Path:
    """The file, without its ending, or the folder that a module's name stands for."""
    parts = name.removeprefix(PREFIX).split(".")
    return Path(os.sep, *(part.replace("%2E", ".").replace("%25", "%") for part in parts))


def loaded() -> dict[str, ModuleType]:
    """The config files that have been executed in this process."""
    return {n: m for n, m in list(sys.modules.items()) if n.startswith(PREFIX) and "__source__" in m.__dict__}


def forget(names: Iterable[str]) -> None:
    """Lets files be executed afresh when they are next imported."""
    for name in names:
        sys.modules.pop(name, None)


def circle(names: Sequence[str]) -> ConfigError:
    """The error of files that import one another."""
    files = [spot(path_of(name)) + ".py" for name in names]
    what = "config files import one another in a circle"
    remedy = "move what both need into a third file"
    return ConfigError(Problem("E-CONFIG-CYCLE", what, files[-2], " -> ".join(files), remedy=remedy))


def imported(file: Path) -> Iterator[Path]:
    """The config files that `file` imports relatively, whether they are there or not."""
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            folder = file.parents[statement.level - 1]
            names = [statement.module] if statement.module else [alias.name for alias in statement.names]
            yield from (folder.joinpath(*name.split(".")).with_suffix(".py") for name in names)


# First, or the path finder would execute a folder's __init__.py and write __pycache__ beside the configs.
sys.meta_path.insert(0, Finder)
