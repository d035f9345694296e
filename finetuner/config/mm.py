"""Config files in mmengine's notation, read into the same nodes.

    with read_base():
        from .base import *
    model.update(adapter=dict(type=LoRA, rank=64))

- Top-level names are the fields of Run; a dict is a node, its `type` a class or the name of one, and left out where
  only one noun fits. Other variables are helpers and may be anything.
- mmengine's `Config` does inheritance and merging, its Runner nothing. Types stay unimported names until they are found
  among finetuner's nouns, and each typo meets the checks that a plain config meets.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeAlias, get_origin

from finetuner.config.files import circle, imported, module_name
from finetuner.config.node import Invalid, Node, at, collecting, short, spot, tell
from finetuner.config.run import Run
from finetuner.config.values import element, function_named, nouns
from finetuner.config.words import hints, is_function, kinds, words
from finetuner.errors import ConfigError, Problem, nearest

Keys: TypeAlias = tuple[str, ...]
"""The way to a value: ("model", "adapter", "rank")."""
Lines: TypeAlias = Callable[[Keys], str]
"""Keys -> "file.py:7: model.adapter.rank"."""
CLOSE = 0.75
"""How alike a plain variable that nothing reads must be to a field of Run to be taken for a typo of it."""


def is_mmengine(source: str) -> bool:
    """Whether a config file is in mmengine's notation: it reads a base, or lays a field of Run out as a dict."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    assigned = assignments(tree)
    if "config" in assigned or any(isinstance(item, ast.FunctionDef) and item.name == "config" for item in tree.body):
        return False
    reads = any(isinstance(item, ast.alias) and item.name == "read_base" for item in ast.walk(tree))
    laid_out = any(is_dict(value) for name, value in assigned.items() if name in hints(Run))
    return reads or "_base_" in assigned or laid_out


def refuse_stars(file: Path, tree: ast.Module) -> None:
    """mmengine cannot follow `from finetuner import *`; only a base is read so, inside `with read_base()`."""
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and item.names[0].name == "*":
            what, found = (
                "a file in mmengine's style imports names, not all of a module",
                f"from {item.module} import *",
            )
            remedy = f"from {item.module} import CausalLM, Dialogues, ... (each name that the file uses)"
            raise ConfigError(Problem("E-CONFIG-STAR", what, spot(file, item.lineno), found, remedy=remedy))


def run_of(file: Path, source: str) -> Run:
    """The run that the file's top-level names describe.

    Raises: ConfigError with everything that is wrong in it.
    """
    from mmengine.config import Config
    from mmengine.config.utils import ConfigParsingError

    tree = ast.parse(source)
    refuse_stars(file, tree)
    refuse_circle((file,))
    try:
        lazy = "_base_" not in assignments(tree)
        names = Config.fromfile(str(file), lazy_import=lazy, format_python_code=False).to_dict()
    except (ConfigParsingError, FileNotFoundError) as error:
        where = spot(file, next((item.lineno for item in tree.body if isinstance(item, ast.With)), 1))
        remedy = "write the name of a file that is there, as in `from .base import *`"
        found = str(error).partition("!")[0]
        raise ConfigError(Problem("E-CONFIG-SIBLING", "a base cannot be read", where, found, remedy=remedy)) from error
    fields = {name: value for name, value in names.items() if name in hints(Run)}
    lines = line_finder(file, tree)
    with collecting() as problems:
        run = node_of(Run, fields, (), lines)
        problems += typos(names, fields, read_names(file), lines)
    if problems or not isinstance(run, Run):
        raise ConfigError(*dict.fromkeys(problems))
    return run


def node_of(noun: type[Node], values: Mapping[str, Any], path: Keys, lines: Lines) -> Any:
    """The node that a dict lays out; `path` leads to it."""
    types = hints(noun)
    given = {name: value_of(item, types.get(name, Any), (*path, name), lines) for name, item in values.items()}
    with at(lambda field: lines((*path, field) if field else path)):
        return noun(**given)


def value_of(value: Any, annotation: Any, path: Keys, lines: Lines) -> Any:
    """A field's value: a dict becomes the noun that it names, a row function's name the function."""
    options = list(kinds(annotation))
    if isinstance(value, str) and any(map(is_function, options)):
        try:
            return function_named(value, lines(path))
        except ConfigError as error:
            return tell(error.problems)
    match value:
        case Mapping() if any(get_origin(kind) is Mapping for kind in options) or annotation is Any:
            return dict(value)
        case Mapping():
            noun = noun_of(value, annotation, path, lines)
            if noun is None:
                return Invalid()
            return node_of(noun, {name: item for name, item in value.items() if name != "type"}, path, lines)
        case list() | tuple():
            return tuple(value_of(item, element(annotation, n), (*path, str(n)), lines) for n, item in enumerate(value))
        case _:
            return value


def noun_of(value: Mapping[str, Any], annotation: Any, path: Keys, lines: Lines) -> type[Node] | None:
    """The noun of a dict: its `type`, else the only one that the field takes; None when it has been told as wrong."""
    options = {kind.__name__: kind for kind in kinds(annotation) if isinstance(kind, type) and issubclass(kind, Node)}
    if "type" not in value and len(options) == 1:
        return next(iter(options.values()))
    if "type" not in value:
        remedy = f"add type={next(iter(options))}" if options else "write a plain value"
        what = f"the dict {'.'.join(path)} has no type"
        tell([Problem("E-CONFIG-MISSING", what, lines(path), short(dict(value)), words(annotation), remedy)])
        return None
    name = str(value["type"]).rpartition(".")[2]
    if name in nouns():
        return nouns()[name]
    best = nearest(name, options or nouns())
    remedy = f"did you mean {best}?" if best else "take one of finetuner's nouns"
    fits = words(annotation) if options else ", ".join(nouns())
    problem = Problem("E-CONFIG-UNKNOWN", f"{'.'.join(path)} has an unknown type", lines(path), name, fits, remedy)
    tell([problem])
    return None


def typos(names: Mapping[str, Any], run: Mapping[str, Any], used: set[str], lines: Lines) -> Iterator[Problem]:
    """The top-level names that were most likely meant as fields of Run, which would otherwise do nothing.

    What one of the files reads (`used`) is a helper. Of the others, a dict is one if it stands somewhere in the run, a
    plain variable unless it looks like a field.
    """
    for name, value in names.items():
        if name in hints(Run):
            continue
        best = nearest(name, hints(Run))
        if isinstance(value, Mapping):
            wrong = ("type" in value or bool(best)) and name not in used and not holds(run, value)
        else:
            alike = bool(best) and SequenceMatcher(None, name, best).ratio() >= CLOSE
            wrong = alike and name not in used
        if wrong:
            what, remedy = f"Run has no field {name!r}", f"did you mean {best!r}?" if best else "remove it, or use it"
            yield Problem("E-CONFIG-UNKNOWN", what, lines((name,)), short(value), ", ".join(hints(Run)), remedy)


def holds(value: Any, wanted: Any) -> bool:
    """Whether `wanted` is `value` or stands somewhere inside."""
    if value == wanted:
        return True
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(holds(item, wanted) for item in inside)


def read_names(file: Path) -> set[str]:
    """The names that the file, or one of its bases, reads."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {item.id for item in ast.walk(tree) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load)}
    return names.union(*(read_names(base) for base in imported(file)))


def assignments(tree: ast.Module) -> dict[str, ast.expr]:
    """Top-level name -> what is last assigned to it."""
    return {keys[0]: value for keys, value in writings(tree) if len(keys) == 1}


def writings(tree: ast.Module) -> Iterator[tuple[Keys, ast.expr]]:
    """What is written at top level, and where to: model = ..., model.adapter.rank = ..., model.update(...)."""
    for item in tree.body:
        match item:
            case ast.Assign(targets=targets, value=value):
                yield from ((keys, value) for target in targets if (keys := way(target)))
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="update", value=holder), args=args) as call):
                yield from ((keys, value) for value in (*args, call) if (keys := way(holder)))


def way(target: ast.expr) -> Keys:
    """model.adapter["rank"] -> ("model", "adapter", "rank"); empty for anything else."""
    match target:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=holder, attr=name) if above := way(holder):
            return (*above, name)
        case ast.Subscript(value=holder, slice=ast.Constant(value=key)) if above := way(holder):
            return (*above, str(key))
        case _:
            return ()


def is_dict(value: ast.expr) -> bool:
    """Whether an expression lays out a dict."""
    return isinstance(value, ast.Dict) or (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict"
    )


def line_finder(file: Path, tree: ast.Module) -> Lines:
    """Tells the line of the innermost value on a way that the file itself writes; those of a base are not looked up."""
    written = list(writings(tree))

    def lines(path: Keys) -> str:
        found = [depth_and_line(path, keys, value) for keys, value in written if keys == path[: len(keys)]]
        line = max(found)[1] if found else None
        return f"{spot(file, line)}: {'.'.join(path)}" if path else spot(file)

    return lines


def depth_and_line(path: Keys, keys: Keys, value: ast.expr) -> tuple[int, int]:
    """How far a value that is written to `keys` leads along `path`, and the line there."""
    depth = len(keys)
    while depth < len(path) and (below := children(value).get(path[depth])) is not None:
        value, depth = below, depth + 1
    return depth, value.lineno


def children(place: ast.expr) -> dict[str, ast.expr]:
    """The values inside an expression by key."""
    match place:
        case ast.Call(keywords=keywords):
            return {keyword.arg: keyword.value for keyword in keywords if keyword.arg is not None}
        case ast.Dict(keys=keys, values=values):
            return {str(key.value): value for key, value in zip(keys, values) if isinstance(key, ast.Constant)}
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return {str(number): item for number, item in enumerate(items)}
        case _:
            return {}


def refuse_circle(chain: Sequence[Path]) -> None:
    """Raises the circle of bases that read one another, which mmengine would follow without end."""
    for base in imported(chain[-1]):
        if base in chain:
            raise circle([module_name(file) for file in (*chain[chain.index(base) :], base)])
        if base.is_file():
            refuse_circle((*chain, base))
