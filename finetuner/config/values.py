"""A field's value from a text of the command line: a literal, a noun, a row function's name, or the text itself.

    1e-5  ("q", "v")  None  LoRA(rank=8)  Steps(500)  data/a.json  a.json,b.json  alpaca  my.module:rows

The text is parsed, never evaluated. What the field takes decides between readings: 2024 is the text "2024" where only a
text fits. A noun stays a `Draft`, so that later overrides can still change it before it is checked.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

import finetuner
from finetuner.config.function import built_in, resolve
from finetuner.config.node import Node, as_value, at
from finetuner.config.words import hints, is_function, kinds
from finetuner.errors import ConfigError, Problem, nearest


@dataclass(slots=True)
class Draft:
    """A node before it is checked; `origins` says which override gave a field, `label` which gave the whole."""

    noun: type[Node]
    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    label: str = ""
    surplus: tuple[Any, ...] = ()
    """Values beyond the fields, kept to be told."""

    def place(self, name: str) -> str:
        """Where a field, or the node as a whole, was given."""
        return self.origins.get(name) or " ".join(dict.fromkeys(self.origins.values())) or self.label

    def build(self) -> Any:
        """The node."""
        names = [f.name for f in dataclasses.fields(self.noun)]  # type: ignore[arg-type]
        values = {name: built(value) for name, value in self.values.items()}
        with at(self.place):
            if self.surplus:
                return self.noun(*(values.get(name) for name in names), *self.surplus)
            return self.noun(**values)


def draft_of(node: Node, label: str = "") -> Draft:
    """The draft that `node` would be built from."""
    names = [f.name for f in dataclasses.fields(node)]  # type: ignore[arg-type]
    return Draft(type(node), {name: getattr(node, name) for name in names}, label=label)


def built(value: Any) -> Any:
    """`value` with its drafts made nodes."""
    match value:
        case Draft():
            return value.build()
        case list() | tuple():
            return tuple(built(item) for item in value)
        case _:
            return value


@cache
def nouns() -> dict[str, type[Node]]:
    """What a config file may say, by name."""
    known = {name: getattr(finetuner, name) for name in finetuner.__all__}
    return {name: noun for name, noun in known.items() if isinstance(noun, type) and issubclass(noun, Node)}


def value_for(text: str, annotation: Any, label: str) -> Any:
    """What `text` says for a field of this type; a text that fits nothing is left for the node to refuse."""
    text = text.strip()
    if any(is_function(kind) for kind in kinds(annotation)):
        return function_named(text, label)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return text
    value = read(tree, text, label)
    if isinstance(value, Draft) or fits(value, annotation):
        return value
    if isinstance(value, bool | None) or (isinstance(tree, ast.Constant) and isinstance(value, str)):
        return value
    others = (read(tree, text, label, plain=False), text)
    return next((other for other in others if fits(other, annotation)), value)


def read(tree: ast.expr, text: str, label: str, *, plain: bool = True) -> Any:
    """The value of a parsed text; bare words become texts, and so do numbers where they are not taken plainly."""

    def inner(item: ast.expr) -> Any:
        return read(item, text, label, plain=plain)

    match tree:
        case ast.Constant(value=int() | float() as number) if plain or isinstance(number, bool):
            return number
        case ast.Constant(value=str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if plain:
            return -number
        case ast.Tuple() | ast.List():
            return tuple(map(inner, tree.elts))
        case ast.Dict() if None not in tree.keys:
            return {inner(key): inner(value) for key, value in zip(tree.keys, tree.values) if key is not None}
        case ast.Call(func=ast.Name(id=name)) if name in nouns():
            return call(nouns()[name], tree, text, label)
        case _:
            return ast.get_source_segment(text, tree)


def call(noun: type[Node], tree: ast.Call, text: str, label: str) -> Draft:
    """The draft of a noun that is written out: LoRA(rank=8)."""
    types = hints(noun)
    names = [f.name for f in dataclasses.fields(noun)]  # type: ignore[arg-type]

    def argument(value: ast.expr, name: str | None) -> Any:
        segment = ast.get_source_segment(text, value) or ""
        return value_for(segment, types.get(name or "", Any), label)

    given = [argument(value, name) for name, value in zip([*names, *[None] * len(tree.args)], tree.args)]
    draft = Draft(noun, dict(zip(names, given)), label=label, surplus=tuple(given[len(names) :]))
    for keyword in tree.keywords:
        if keyword.arg is None or keyword.arg in draft.values:
            what = f"{noun.__name__} takes each field once, by name or by position"
            found = ast.get_source_segment(text, keyword) or ""
            raise ConfigError(Problem("E-CONFIG-TWICE", what, label, found, ", ".join(names), "write each field once"))
        draft.values[keyword.arg] = argument(keyword.value, keyword.arg)
    return draft


def function_named(text: str, label: str) -> Callable[..., Any]:
    """A row function by its own name, or by "module:name"."""
    known = built_in()
    if text in known:
        return known[text]
    if text.isidentifier():
        best = nearest(text, known)
        remedy = f"did you mean {best!r}?" if best else "give package.module:function for one of your own"
        raise ConfigError(
            Problem("E-CONFIG-FUNCTION", f"no row function is called {text!r}", label, text, ", ".join(known), remedy)
        )
    try:
        return resolve(text)
    except ConfigError as error:
        raise ConfigError(*(dataclasses.replace(p, where=p.where or label) for p in error.problems)) from error


def fits(value: Any, annotation: Any) -> bool:
    """Whether a field of this type takes the value."""
    try:
        TypeAdapter(annotation).validate_python(as_value(value), strict=True)
    except ValidationError:
        return False
    return True


def element(annotation: Any, index: int) -> Any:
    """The type of one element of a tuple field."""
    for kind in kinds(annotation):
        if get_origin(kind) is tuple:
            args = get_args(kind)
            return args[0] if args[-1] is ... else dict(enumerate(args)).get(index, Any)
    return Any
