"""A written state, read by name: any elements of any parameter, from whichever ranks' files hold them.

    saved = open_state(folder)
    saved.check("AdamW", {"model.norm.weight": (64,), ...})
    saved.master("model.norm.weight", 16, 48)             # a rank's part, or all: 0, numel
    saved.moment("exp_avg", "model.norm.weight", 16, 48)
    saved.single("step", "model.norm.weight")

- So what N ranks of one engine wrote, M ranks of another read. Only the asked-for elements are read from disk.
- Nothing is matched by position: a parameter gets the state that was saved under its name, or loading is refused.
- Nothing is executed or unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetuner.engine.state import BY_ELEMENT, files
from finetuner.engine.unfit import check_names, check_shape, check_sound, problem, some, unreadable

DESCRIPTION = re.compile(r"state(?:-(?P<rank>[0-9]+)-of-(?P<world>[0-9]+))?\.json")


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank wrote."""

    body: Mapping[str, Any]
    parts: Mapping[str, tuple[int, int]]
    """By name, the elements that it holds."""
    moments: Tensors
    masters: Tensors


@dataclass(frozen=True, slots=True)
class Saved:
    """An opened state."""

    folder: Path
    optimizer: str
    """Its class."""
    parameters: Mapping[str, Any]
    """By name: shape of the whole parameter, names of the states that are tensors, the other states."""
    numbers: Mapping[str, Any]
    shards: tuple[Shard, ...]

    def check(self, optimizer: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuses a state of another optimizer, or of parameters of other names and shapes.

        Raises:
            CheckpointError: E-STATE-OPTIMIZER, E-STATE-NAMES, E-STATE-SHAPE.
        """
        if self.optimizer != optimizer:
            what, remedy = "the state is of another optimizer", "give the optimizer that the checkpoint was made with"
            raise problem("E-STATE-OPTIMIZER", what, self.folder, self.optimizer, optimizer, remedy)
        check_names(self.folder, "parameters", self.parameters, shapes)
        for name, shape in shapes.items():
            check_shape(self.folder, name, self.parameters[name]["shape"], shape)

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return math.prod(self.parameters[name]["shape"])

    def states(self, name: str) -> tuple[str, ...]:
        """Keys of a parameter's states that are tensors; none before the first step."""
        return tuple(self.parameters[name]["states"])

    def master(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of a trained weight, 1-D."""
        return self._elements(name, lambda shard: (shard.masters, name), start, stop)

    def moment(self, key: str, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of a state that has one number for each of the parameter's, 1-D."""
        assert key in BY_ELEMENT, key
        return self._elements(name, lambda shard: (shard.moments, f"{key}/{name}"), start, stop)

    def single(self, key: str, name: str) -> Tensor:
        """A state that every part's holder keeps whole: the step.

        Raises:
            CheckpointError: E-STATE-MIXED, the files do not agree: they are of different moments.
        """
        assert key not in BY_ELEMENT, key
        found = [shard.moments.whole(f"{key}/{name}") for shard in self.shards if name in shard.parts]
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise mixed(self.folder, f"{key} of {name} differs")
        return found[0]

    def _elements(self, name: str, place: Callable[[Shard], tuple[Tensors, str]], start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.numel(name), (name, start, stop)
        result: Tensor | None = None
        for shard in self.shards:
            first, end = shard.parts.get(name, (0, 0))
            low, high = max(start, first), min(stop, end)
            if low < high:
                tensors, key = place(shard)
                piece = tensors.elements(key, low - first, high - first)
                if (low, high) == (start, stop):
                    return piece
                result = piece.new_empty(stop - start) if result is None else result
                result[low - start : high - start] = piece
        assert result is not None, "open_state has seen that each element is held"
        return result


class Tensors:
    """A safetensors file, read in slices."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, "pt")
            self.names: frozenset[str] = frozenset(self._file.keys())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
        check_sound(path, {name: torch.empty(self.shape(name)) for name in self.names if 0 in self.shape(name)})

    def shape(self, name: str) -> list[int]:
        return list(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, U8."""
        return str(self._file.get_slice(name).get_dtype())

    def whole(self, name: str) -> Tensor:
        """A tensor, finite and not empty."""
        tensor: Tensor = self._file.get_tensor(name)
        check_sound(self.path, {name: tensor})
        return tensor

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor: the rows that hold them are read, and cut."""
        shape = self.shape(name)
        size = math.prod(shape[1:])
        first = start // size if shape else 0
        rows = self._file.get_slice(name)[first : -(-stop // size)] if shape else self._file.get_tensor(name)
        flat: Tensor = rows.reshape(-1)[start - first * size : stop - first * size]
        check_sound(self.path, {name: flat})
        # A part of a row would keep the whole row in memory.
        return flat if flat.numel() == rows.numel() else flat.clone()


def open_state(folder: Path) -> Saved:
    """The state in `folder`: headers are read and compared, no tensor yet.

    Raises:
        CheckpointError: E-STATE-FILE, E-STATE-NAMES, E-STATE-SHAPE, E-STATE-PARTS, E-STATE-MIXED: a file is missing or
            torn, or the files do not hold what they say, or not all of it, or do not belong together.
    """
    shards = tuple(shard_of(folder, *names) for names in found_files(folder))
    parameters: dict[str, Any] = {}
    for shard in shards:
        for name, entry in shard.body["parameters"].items():
            if parameters.setdefault(name, entry) != entry:
                raise mixed(folder, f"shape or states of {name} differ")
    holders = [shard.body for shard in shards if shard.parts] or [shard.body for shard in shards]
    for what in ("optimizer", "numbers"):
        if any(body[what] != holders[0][what] for body in holders):
            raise mixed(folder, f"{what}: {some([str(body[what]) for body in holders])}")
    saved = Saved(folder, holders[0]["optimizer"], parameters, holders[0]["numbers"], shards)
    check_even(saved)
    for name in parameters:
        check_held(saved, name)
    return saved


def found_files(folder: Path) -> list[tuple[str, str, str]]:
    """Names of each rank's files.

    Raises:
        CheckpointError: E-STATE-FILE, E-STATE-MIXED.
    """
    matches = [match for path in folder.glob("state*.json") if (match := DESCRIPTION.fullmatch(path.name))]
    worlds = {int(match["world"] or 1) for match in matches}
    if len(worlds) > 1:
        raise mixed(folder, "files of " + " and of ".join(f"{world} ranks" for world in sorted(worlds)))
    world = worlds.pop() if worlds else 1
    wanted = [files(rank, world) for rank in range(world)]
    lost = [name for names in wanted for name in names if not (folder / name).is_file()]
    if lost:
        raise unreadable(folder / lost[0], f"{some(lost)}: not there")
    return wanted


def shard_of(folder: Path, optimizer: str, masters: str, description: str) -> Shard:
    """What one rank wrote, its tensors' names and shapes as they must be."""
    try:
        body = dict(json.loads((folder / description).read_text(encoding="utf-8")))
        parameters = body["parameters"]
        given = body.get("parts", {name: (0, math.prod(entry["shape"])) for name, entry in parameters.items()})
        parts = {str(name): (int(start), int(stop)) for name, (start, stop) in given.items()}
        expected = [f"{key}/{name}" for name, entry in parameters.items() for key in entry["states"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(folder / description, error) from error
    shard = Shard(body, parts, Tensors(folder / optimizer), Tensors(folder / masters))
    check_names(folder / description, "parts", parts, parameters)
    check_names(folder / optimizer, "states", shard.moments.names, expected)
    check_names(folder / masters, "weights", shard.masters.names, parts)
    for name, (start, stop) in parts.items():
        shape = parameters[name]["shape"]
        fits = [shape] * ((start, stop) == (0, math.prod(shape))) + [[stop - start]] * ("parts" in body)
        check_shape(folder / masters, name, shard.masters.shape(name), *fits)
        for key in parameters[name]["states"]:
            # bitsandbytes lays some of its moments out as it likes where they are in 8 bits.
            if key in BY_ELEMENT[:3]:
                check_shape(folder / optimizer, f"{key}/{name}", shard.moments.shape(f"{key}/{name}"), *fits)
    return shard


def check_held(saved: Saved, name: str) -> None:
    """Refuses a parameter of which some elements are in no file, or more than it has.

    Raises:
        CheckpointError: E-STATE-PARTS.
    """
    reached, size = 0, saved.numel(name)
    for start, stop in sorted(shard.parts[name] for shard in saved.shards if name in shard.parts):
        if start > reached or not 0 <= start < stop <= size:
            break
        reached = max(reached, stop)
    if reached != size:
        held = ", ".join(
            f"{shard.parts[name][0]}..{shard.parts[name][1]}" for shard in saved.shards if name in shard.parts
        )
        what, fits = f"elements of {name} are in no file", f"0..{size}"
        raise problem("E-STATE-PARTS", what, saved.folder, held, fits, "resume from another checkpoint")


def check_even(saved: Saved) -> None:
    """Refuses a parameter that lost states which the others have; those with moments in 8 bits are compared among
    themselves, as bitsandbytes holds small parameters' in float32.

    Raises:
        CheckpointError: E-STATE-NAMES.
    """
    packed = {
        name
        for shard in saved.shards
        for name in shard.parts
        if f"state1/{name}" in shard.moments.names and shard.moments.dtype(f"state1/{name}") == "U8"
    }
    for names in (packed, saved.parameters.keys() - packed):
        entries = {name: saved.parameters[name] for name in names}
        wanted = max((sorted([*e["states"], *e["numbers"]]) for e in entries.values()), key=len, default=[])
        for name, entry in entries.items():
            lost = set(wanted) - set(entry["states"]) - set(entry["numbers"])
            if lost and (entry["states"] or entry["numbers"]):
                what, remedy = f"{name} lacks states that the others have", "resume from another checkpoint"
                raise problem("E-STATE-NAMES", what, saved.folder, some(sorted(lost)), some(wanted), remedy)


def mixed(folder: Path, found: str) -> Exception:
    """E-STATE-MIXED."""
    what, fits = "the files of the state do not belong together", "what the ranks of one run wrote at one step"
    return problem("E-STATE-MIXED", what, folder, found, fits, "resume from another checkpoint")
