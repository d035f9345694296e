"""`fingerprint`: one name for everything that made the samples; a cache of another name is another cache.

It covers the files' whole contents (not their size and time), the source's and the data's fields, the row function with
all that it calls and uses, the encoder, and this package's version and code.

- A function is known by its bytecode, constants, defaults, and what its globals and closure hold, all the way down;
  functions of installed packages by name and version.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetuner
from finetuner.config.data import Dialogues, Documents
from finetuner.data.source import files_of
from finetuner.dialogue.encode import EncoderSpec
from finetuner.errors import DataError, Problem
from finetuner.runtime.files import unreadable

OWN = ("data/worker.py", "data/source.py", "data/cache.py", "runtime/files.py", "runtime/json_rows.py",
       "runtime/json_value.py", "runtime/json_window.py", "runtime/table_rows.py")  # fmt: skip
INSTALLED = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """The name of a cache, and the files that it was taken from."""

    digest: str
    files: list[dict[str, Any]]
    """Name, size and sha256 of each file."""
    states: list[tuple[Path, tuple[int, int, int]]]

    def check_unchanged(self) -> None:
        """Raises DataError E-DATA-CHANGED if a file was written to since."""
        for path, state in self.states:
            if not path.exists() or _state(path) != state:
                raise DataError(
                    Problem(
                        "E-DATA-CHANGED",
                        "a file of data changed while it was read",
                        where=str(path),
                        fits="a file that stays as it is",
                        remedy="start again once the file is written",
                    )
                )


def fingerprint(data: Dialogues | Documents, spec: EncoderSpec) -> Fingerprint:
    """The fingerprint of the samples that `spec` makes of `data`.

    Raises:
        DataError: a file is not there or cannot be read.
    """
    paths = files_of(data.source)
    states, files = [], []
    for path in paths:
        try:
            states.append((path, _state(path)))
            files.append({"name": str(path), "size": path.stat().st_size, "sha256": _sha256(path)})
        except OSError as error:
            raise unreadable(path, error) from None
    digest = hashlib.sha256(finetuner.__version__.encode())
    package = Path(finetuner.__file__).parent
    for name in OWN:
        digest.update((package / name).read_bytes())
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.name != "rows"}
    # Packing is done on the finished samples.
    fields.pop("pack", None)
    named = {name: repr(value) for name, value in fields.items()}
    digest.update(json.dumps([type(data).__name__, named, files, spec.fingerprint]).encode())
    for piece in describe(data.rows):
        digest.update(piece.encode() + b"\0")
    return Fingerprint(digest.hexdigest()[:40], files, states)


def describe(value: Any) -> Iterator[str]:
    """Text that changes whenever what a function does may have changed, its helpers and constants included."""
    yield from _describe(value, {})


def _describe(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Pieces for any value that a function can reach; each object once, `seen` keeps them alive."""
    if isinstance(value, str | bytes | int | float | complex | None | type(Ellipsis)):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"seen {list(seen).index(id(value))}"
        return
    seen[id(value)] = value
    match value:
        case types.FunctionType():
            yield from _function(value, seen)
        case types.MethodType():
            yield from _describe([value.__func__, value.__self__], seen)
        case types.CodeType():
            yield from _code(value, seen)
        case types.ModuleType():
            yield f"module {value.__name__} {_version(value.__name__)}"
        case type():
            yield from _class(value, seen)
        case re.Pattern():
            yield f"pattern {value.pattern!r} {value.flags}"
        case list() | tuple():
            yield f"{type(value).__name__} {len(value)}"
            for item in value:
                yield from _describe(item, seen)
        case set() | frozenset():
            yield f"set {len(value)}"
            yield from sorted("|".join(_describe(item, dict(seen))) for item in value)
        case dict():
            yield f"dict {len(value)}"
            for key, item in value.items():
                yield from _describe(key, seen)
                yield from _describe(item, seen)
        case _:
            yield from _object(value, seen)


def _function(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    yield f"function {function.__module__} {function.__qualname__}"
    if _is_installed(function.__code__.co_filename):
        yield _version(function.__module__)
        return
    yield from _describe([function.__code__, function.__defaults__, function.__kwdefaults__], seen)
    for cell in function.__closure__ or ():
        yield from _describe(cell.cell_contents, seen)
    for name in sorted(_imports(function.__code__)):
        yield from _import(name)
    names = _names(function.__code__)
    for name in sorted(names & function.__globals__.keys()):
        used = function.__globals__[name]
        yield f"global {name}"
        yield from _describe(used, seen)
        if isinstance(used, types.ModuleType) and not _is_installed(getattr(used, "__file__", None) or sys.prefix):
            for attribute in sorted(names & vars(used).keys()):
                yield from _describe(vars(used)[attribute], seen)


def _code(code: types.CodeType, seen: dict[int, Any]) -> Iterator[str]:
    yield f"code {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}"
    for constant in code.co_consts:
        yield from _describe(constant, seen)


def _names(code: types.CodeType) -> set[str]:
    """Every global or attribute that a function mentions, inner functions included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _imports(code: types.CodeType) -> set[str]:
    """Modules that a function imports when it runs, inner functions included."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return own.union(*(_imports(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)))


def _import(name: str) -> Iterator[str]:
    """A module that is not loaded yet: the text of its file, unless it is an installed one."""
    found = importlib.util.find_spec(name) if name else None
    file = (found.origin if found is not None else None) or ""
    yield f"import {name}"
    if os.path.isfile(file) and not _is_installed(file):
        yield _sha256(Path(file))


def _class(cls: type, seen: dict[int, Any]) -> Iterator[str]:
    yield f"class {cls.__module__} {cls.__qualname__}"
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or _is_installed(file):
        yield _version(cls.__module__)
        return
    hidden = ("__dict__", "__weakref__", "__module__", "__firstlineno__", "__static_attributes__")
    for name, member in sorted(vars(cls).items()):
        if name not in hidden and not name.startswith("__pydantic"):
            yield f"member {name}"
            yield from _describe(member, seen)
    for parent in cls.__bases__:
        yield from _describe(parent, seen)


def _object(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Any other object: its class, and what it holds."""
    yield from _describe(type(value), seen)
    if isinstance(value, staticmethod | classmethod):
        yield from _describe(value.__func__, seen)
    elif isinstance(value, property):
        yield from _describe([value.fget, value.fset], seen)
    elif hasattr(value, "__dict__"):
        yield from _describe(dict(sorted(vars(value).items())), seen)
    elif " at 0x" not in (shown := repr(value)):
        yield shown


def _is_installed(file: str) -> bool:
    """Whether a file is of the standard library or of an installed package other than this one."""
    real = os.path.realpath(file)
    own = os.path.realpath(os.path.dirname(finetuner.__file__))
    return (real.startswith(("<", *INSTALLED)) and not real.startswith(own)) or file.startswith("<frozen")


def _version(module: str | None) -> str:
    top = sys.modules.get((module or "").split(".")[0])
    return str(getattr(top, "__version__", sys.version_info[:3]))


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
