"""What resuming needs of the optimizer and of the trained weights: written by name, bit for bit; `saved.py` reads it.

    optimizer.safetensors   "exp_avg/model.layers.0.q_proj.weight", ...: every state that is a tensor
    masters.safetensors     the trained weights in full precision
    state.json              the optimizer's kind, each parameter's shape and states, the rest

- Where several ranks hold parts, each writes its own: optimizer-0-of-2.safetensors, masters-0-of-2.safetensors and
  state-0-of-2.json, which says which elements of which parameter they hold.
- Elements are counted through the flattened parameter. Neither the number of ranks nor the engine is in the way of who
  reads them: see `saved.py`.
- No pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from finetuner.engine.unfit import check_sound
from finetuner.runtime.commit import write_file
from finetuner.runtime.fault import fault

BY_ELEMENT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state1", "state2")
"""States that have one number for each of the parameter's; any other is kept whole by each rank that holds a part."""


@dataclass(frozen=True, slots=True)
class State:
    """What one rank holds and `write_state` writes; its tensors are the live ones that training changes."""

    optimizer: str
    """Its class: "AdamW"."""
    parameters: Mapping[str, Any]
    """By name: shape of the whole parameter, names of the states that are tensors, the other states."""
    moments: Mapping[str, Tensor]
    """"exp_avg/NAME" and the like."""
    masters: Mapping[str, Tensor]
    parts: Mapping[str, tuple[int, int]]
    """By name the elements start..stop that this rank holds, at least one. Its master and its moments by element are of
    the parameter's shape where that is all of it, else 1-D."""


def state_of(optimizer: Optimizer, masters: Mapping[str, Tensor]) -> State:
    """The optimizer's state beside the trained weights, by name, where this rank holds all of them."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # paged moments lie on the host, and a step that is under way still writes them
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter, _ in named_parameters(optimizer):
        single: dict[str, Any] = {}
        states: list[str] = []
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
                states.append(key)
            else:
                single[key] = value
        parameters[name] = entry(parameter.shape, states, single)
    parts = {name: (0, tensor.numel()) for name, tensor in masters.items()}
    return State(type(optimizer).__name__, parameters, tensors, masters, parts)


def nothing() -> State:
    """The state of a rank that has nothing to write, as others hold all of it."""
    return State("", {}, {}, {}, {})


def entry(shape: torch.Size, states: list[str], numbers: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What `State.parameters` says of a parameter: whole shape, states that are tensors, the other states."""
    return {"shape": list(shape), "states": sorted(states), "numbers": dict(numbers)}


def write_state(
    folder: Path, state: State, rank: int = 0, world: int = 1, *, numbers: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Writes into `folder` what the `rank`-th of the `world` ranks that hold parts holds.

    `numbers` is JSON that `Saved.numbers` gives back; the same on all ranks.

    Raises:
        CheckpointError: a tensor is empty (a shard of ZeRO-3, not the weight) or not finite.
    """
    folder.mkdir(exist_ok=True)
    optimizer, masters, description = files(rank, world)
    _write(folder / optimizer, state.moments)
    _write(folder / masters, state.masters)
    body = {"optimizer": state.optimizer, "parameters": state.parameters, "numbers": dict(numbers)}
    if world > 1:
        _check_parts(state)
        body["parts"] = state.parts
    write_file(folder / description, json.dumps(body, indent=1).encode())


def files(rank: int, world: int) -> tuple[str, str, str]:
    """Names of a rank's files: moments, masters, and what describes them."""
    own = "" if world == 1 else f"-{rank}-of-{world}"
    return f"optimizer{own}.safetensors", f"masters{own}.safetensors", f"state{own}.json"


def save_state(
    folder: Path, optimizer: Optimizer, masters: Mapping[str, Tensor], numbers: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """`write_state` of the state as it stands now, where this rank holds all of it."""
    write_state(folder, state_of(optimizer, masters), numbers=numbers)


def named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, torch.nn.Parameter, dict[str, Any]]]:
    """The optimizer's parameters, each with its name and its group."""
    for group in optimizer.param_groups:
        names = group.get("param_names")
        assert names is not None, "the optimizer is built of named parameters"
        for name, parameter in zip(names, group["params"], strict=True):
            yield name, parameter, group


def _check_parts(state: State) -> None:
    assert state.parts.keys() == state.masters.keys() == state.parameters.keys(), "one name, one part"
    for name, (start, stop) in state.parts.items():
        assert 0 <= start < stop <= math.prod(state.parameters[name]["shape"]), (name, start, stop)
        held = [state.masters[name]]
        held += [state.moments[f"{key}/{name}"] for key in state.parameters[name]["states"] if key in BY_ELEMENT]
        assert {tensor.numel() for tensor in held} == {stop - start}, (name, start, stop)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    check_sound(path, tensors)
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        there = tensor.detach().to("cpu").contiguous()
        # bitsandbytes shares its quantisation map between parameters, and parts may be views of one flat tensor;
        # safetensors writes no shared memory.
        plain[name] = there.clone() if there.untyped_storage().data_ptr() in seen else there
        seen.add(there.untyped_storage().data_ptr())
    fault("open")
    save_file(plain, path, metadata={"format": "pt"})
    fault("write")
