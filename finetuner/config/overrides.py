"""Fields of a run set from the command line: `optim.lr=1e-5 model.adapter.rank=16 'until=Steps(500)'`.

    items -> (path, value) -> drafts of the nodes on the path -> all edits -> nodes, checked from the leaves up

- All overrides are applied before any node is checked, so that those which fit only together may come in any order.
- A value is a literal, a noun such as LoRA(rank=8), a bare text, or the name of a row function. Nothing is evaluated.
- All that is wrong is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args

from finetuner.config.node import Node, collecting, short
from finetuner.config.run import Run
from finetuner.config.values import Draft, draft_of, element, nouns, value_for
from finetuner.config.words import default_of, elsewhere, hints, kinds, words
from finetuner.errors import ConfigError, Problem, nearest


def apply(run: Run, items: Sequence[str]) -> Run:
    """`run` with the overrides applied.

    Raises: ConfigError with everything that is wrong in them.
    """
    if not items:
        return run
    root = draft_of(run)
    problems: list[Problem] = []
    for item in items:
        try:
            edit(root, item)
        except ConfigError as error:
            problems += error.problems
    with collecting() as found:
        changed = root.build()
    if problems or found:
        raise ConfigError(*dict.fromkeys([*problems, *found]))
    return changed  # type: ignore[no-any-return]


def edit(root: Draft, item: str) -> None:
    """Puts the value that `item` gives to its place below `root`."""
    path, equals, text = item.partition("=")
    label = f"override {item!r}"
    if not equals or not all(path.strip().split(".")):
        fits = "field=value, such as optim.lr=1e-5 or 'until=Steps(500)'"
        remedy = f"write {path}=..." if path and not equals else "put the field's path before the ="
        raise ConfigError(Problem("E-OVERRIDE-FORM", "this is no override", label, item, fits, remedy))
    put(root, path.strip().split("."), text, Place(root, label, ()), Run)


@dataclass(frozen=True, slots=True)
class Place:
    """How far the path of an override has been followed."""

    root: Draft
    label: str
    trail: tuple[str, ...]

    def below(self, part: str) -> Place:
        return Place(self.root, self.label, (*self.trail, part))


def put(holder: Any, parts: Sequence[str], text: str, place: Place, annotation: Any) -> Any:
    """`holder` with the value that `text` says at the path `parts`; nodes and tuples on the way become drafts."""
    part, rest = parts[0], parts[1:]
    match holder:
        case Node():
            return put(draft_of(holder, place.label), parts, text, place, annotation)
        case Draft():
            types = hints(holder.noun)
            if part not in types:
                raise ConfigError(unknown(holder, parts, place))
            if rest:
                current = holder.values.get(part, default(holder.noun, part))
                holder.values[part] = put(current, rest, text, place.below(part), types[part])
            else:
                holder.values[part] = value_for(text, types[part], place.label)
            holder.origins[part] = place.label
            return holder
        case tuple() | list() if part.isdecimal() and int(part) < len(holder):
            index, kind = int(part), element(annotation, int(part))
            if rest:
                value = put(holder[index], rest, text, place.below(part), kind)
            else:
                value = value_for(text, kind, place.label)
            return [*holder[:index], value, *holder[index + 1 :]]
        case Mapping() if rest and isinstance(holder.get(part), Mapping):
            return {**holder, part: put(holder[part], rest, text, place.below(part), Mapping[str, Any])}
        case Mapping():
            # Names of parameters have dots of their own: optim.rates.model.embed_tokens.weight=1e-5
            return {**holder, ".".join(parts): value_for(text, get_args(annotation)[1], place.label)}
        case _:
            raise ConfigError(no_way(holder, parts, place, annotation))


def default(noun: type[Node], name: str) -> Any:
    """The value of a field that is not given; None where there is none."""
    value = default_of(next(field for field in fields(noun) if field.name == name))  # type: ignore[arg-type]
    return None if value is MISSING else value


def unknown(holder: Draft, parts: Sequence[str], place: Place) -> Problem:
    """The problem of a path that leads nowhere: what was meant, or where a field of that name is."""
    names, part = list(hints(holder.noun)), parts[0]
    best = nearest(part, names)
    homes = [path for path in paths(place.root) if path.rpartition(".")[2] == parts[-1]]
    if best:
        remedy = f"did you mean {'.'.join([*place.trail, best, *parts[1:]])}?"
    elif homes:
        remedy = f"did you mean {homes[0]}?"
    else:
        others = {name: noun for name, noun in nouns().items() if noun is not holder.noun}
        remedy = elsewhere(part, holder.noun, others) or "see `finetuner show CONFIG --json` for every field"
    what = f"{holder.noun.__name__} has no field {part!r}"
    return Problem("E-OVERRIDE-PATH", what, place.label, ".".join([*place.trail, *parts]), ", ".join(names), remedy)


def no_way(holder: Any, parts: Sequence[str], place: Place, annotation: Any) -> Problem:
    """The problem of a path that goes on below a value without fields."""
    trail = ".".join(place.trail)
    what = f"{trail} has no {parts[0]!r}"
    found = f"{trail}={short(holder)}"
    if isinstance(holder, tuple | list):
        fits, remedy = f"0 to {len(holder) - 1}", "give the number of one that is there"
    else:
        nodes = [kind.__name__ for kind in kinds(annotation) if kind in nouns().values()]
        fits = words(annotation)
        remedy = f"give '{trail}={nodes[0]}({parts[0]}=...)'" if nodes else f"give {trail}=..."
    return Problem("E-OVERRIDE-PATH", what, place.label, found, fits, remedy)


def paths(value: Any, trail: str = "") -> Iterator[str]:
    """The paths of all fields below a draft or a node, nearest first."""
    match value:
        case Draft():
            items = dict(value.values)
        case Node():
            items = draft_of(value).values
        case _:
            return
    below = {f"{trail}.{name}".lstrip("."): item for name, item in items.items()}
    yield from below
    for path, item in below.items():
        yield from paths(item, path)
