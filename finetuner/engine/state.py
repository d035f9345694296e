"""What resuming needs of the optimizer and of the trained weights: written and read by name, bit for bit.

    optimizer.safetensors   "exp_avg/model.layers.0.q_proj.weight", ...: every state that is a tensor
    masters.safetensors     the trained weights in full precision
    state.json              the optimizer's kind, each parameter's shape and states, the rest

- Nothing is matched by position: a parameter gets the state that was saved under its name, or loading is refused.
- No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from finetuner.errors import CheckpointError, Problem, nearest
from finetuner.runtime.commit import write_file
from finetuner.runtime.fault import fault

OPTIMIZER, MASTERS, NUMBERS = "optimizer.safetensors", "masters.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """What `write_state` writes; as `state_of` gives it, its tensors are those that training changes."""

    optimizer: str
    """Its class."""
    parameters: Mapping[str, Any]
    """By name: shape, names of the states that are tensors, the other states."""
    moments: Mapping[str, Tensor]
    """"exp_avg/NAME" and the like."""
    masters: Mapping[str, Tensor]


def state_of(optimizer: Optimizer, masters: Mapping[str, Tensor]) -> State:
    """The optimizer's state beside the trained weights, by name."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # paged moments lie on the host, and a step that is under way still writes them
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    for name, parameter, _ in _named(optimizer):
        single: dict[str, Any] = {}
        states: list[str] = []
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
                states.append(key)
            else:
                single[key] = value
        parameters[name] = {"shape": list(parameter.shape), "states": sorted(states), "numbers": single}
    return State(type(optimizer).__name__, parameters, tensors, masters)


def write_state(folder: Path, state: State, numbers: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Writes `state` into `folder`; `numbers` is JSON that `load_numbers` gives back.

    Raises:
        CheckpointError: a tensor is empty (a shard of ZeRO-3, not the weight) or not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / OPTIMIZER, state.moments)
    _write(folder / MASTERS, state.masters)
    body = {"optimizer": state.optimizer, "parameters": state.parameters, "numbers": dict(numbers)}
    write_file(folder / NUMBERS, json.dumps(body, indent=1).encode())


def save_state(
    folder: Path, optimizer: Optimizer, masters: Mapping[str, Tensor], numbers: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """`write_state` of the state as it stands now."""
    write_state(folder, state_of(optimizer, masters), numbers)


def load_state(folder: Path, optimizer: Optimizer) -> dict[str, Tensor]:
    """Gives every parameter of `optimizer` the state saved under its name; returns the trained weights by name.

    Raises:
        CheckpointError: E-STATE-NAMES, E-STATE-SHAPE, E-STATE-OPTIMIZER, E-STATE-FILE: it is another model's or torn.
    """
    body = _json(folder / NUMBERS)
    tensors = read_tensors(folder / OPTIMIZER)
    saved: dict[str, Any] = body["parameters"]
    if body["optimizer"] != type(optimizer).__name__:
        raise _problem(
            "E-STATE-OPTIMIZER",
            "the state is of another optimizer",
            folder,
            body["optimizer"],
            type(optimizer).__name__,
            "give the optimizer that the checkpoint was made with",
        )
    named = list(_named(optimizer))
    _same_names(folder, "parameters", saved, [name for name, _, _ in named])
    expected = [f"{key}/{name}" for name, entry in saved.items() for key in entry["states"]]
    _same_names(folder, "states", tensors, expected)
    _even(folder, saved, tensors)
    for name, parameter, _ in named:
        if list(parameter.shape) != saved[name]["shape"]:
            raise _shape(folder, name, saved[name]["shape"], list(parameter.shape))
    for name, parameter, group in named:
        entry = saved[name]
        state: dict[str, Any] = dict(entry["numbers"])
        for key in entry["states"]:
            value = tensors[f"{key}/{name}"]
            if key.startswith(("exp_avg", "max_exp_avg")) and value.shape != parameter.shape:
                raise _shape(folder, f"{key}/{name}", list(value.shape), list(parameter.shape))
            # torch keeps the step on the CPU, unless the fused or capturable kernel reads it on the device.
            stays = key == "step" and not (group.get("fused") or group.get("capturable"))
            state[key] = value if stays else _placed(optimizer, parameter, key, value)
        if state:
            optimizer.state[parameter] = state
    return read_tensors(folder / MASTERS)


def load_numbers(folder: Path) -> dict[str, Any]:
    """The `numbers` given to `write_state`."""
    return dict(_json(folder / NUMBERS)["numbers"])


def load_weights(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Copies the trained weights saved in `folder` into `targets`, strictly by name and shape."""
    give(folder, read_tensors(folder / MASTERS), targets)


def give(where: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copies each of `tensors` into the one of `targets` that bears its name, if names and shapes are the same."""
    _same_names(where, "weights", tensors, targets)
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise _shape(where, name, list(tensors[name].shape), list(target.shape))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each finite and not empty."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    _sound(path, tensors)
    return tensors


def _named(optimizer: Optimizer) -> Iterator[tuple[str, torch.nn.Parameter, dict[str, Any]]]:
    for group in optimizer.param_groups:
        names = group.get("param_names")
        assert names is not None, "the optimizer is built of named parameters"
        for name, parameter in zip(names, group["params"], strict=True):
            yield name, parameter, group


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    _sound(path, tensors)
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        there = tensor.detach().to("cpu").contiguous()
        # bitsandbytes shares its quantisation map between parameters; safetensors writes no shared memory.
        plain[name] = there.clone() if there.untyped_storage().data_ptr() in seen else there
        seen.add(there.untyped_storage().data_ptr())
    fault("open")
    save_file(plain, path, metadata={"format": "pt"})
    fault("write")


def _sound(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise _problem(
                "E-STATE-EMPTY",
                f"{name} is empty",
                path,
                f"shape {list(tensor.shape)}",
                "the whole tensor",
                "gather sharded weights before they are saved",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _problem(
                "E-STATE-NONFINITE",
                f"{name} has NaN or infinity in it",
                path,
                f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers",
                "finite numbers",
                "go on from an older checkpoint, with a smaller learning rate",
            )


def _same_names(where: Path, what: str, saved: Iterable[str], wanted: Iterable[str]) -> None:
    have, want = set(saved), set(wanted)
    missing, unexpected = sorted(want - have), sorted(have - want)
    if missing or unexpected:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(unexpected)}"] * bool(unexpected)
        close = nearest(missing[0], unexpected) if missing else ""
        hint = f" ({close} may be {missing[0]})" if close else ""
        raise _problem(
            "E-STATE-NAMES",
            f"the {what} in the checkpoint are not this model's",
            where,
            "; ".join(parts) + hint,
            f"exactly the {len(want)} names of this model",
            "resume with the config that the checkpoint was made with",
        )


def _placed(optimizer: Optimizer, parameter: torch.nn.Parameter, key: str, value: Tensor) -> Tensor:
    """`value` on the parameter's device; where bitsandbytes pages the moments, in a page of its own."""
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        page: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
        return page.copy_(value)
    return value.to(parameter.device)


def _even(where: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Parameters of one optimizer have the same states, those with moments in 8 bits among themselves (bitsandbytes
    holds small parameters' in float32); one that lacks some lost them."""
    packed = {name for name in saved if f"state1/{name}" in tensors and tensors[f"state1/{name}"].dtype == torch.uint8}
    for names in (packed, saved.keys() - packed):
        _same_states(where, {name: saved[name] for name in names})


def _same_states(where: Path, entries: Mapping[str, Any]) -> None:
    kinds = {tuple(sorted(entry["states"] + list(entry["numbers"]))) for entry in entries.values()}
    wanted = max(kinds, key=len, default=())
    for name, entry in entries.items():
        lost = set(wanted) - set(entry["states"]) - set(entry["numbers"])
        if lost and (entry["states"] or entry["numbers"]):
            raise _problem(
                "E-STATE-NAMES",
                f"{name} lacks states that the others have",
                where,
                _some(sorted(lost)),
                _some(list(wanted)),
                "resume from another checkpoint",
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return dict(body)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    what, fits = "a file of the state cannot be read", "the file that was written"
    return _problem("E-STATE-FILE", what, path, str(error), fits, "resume from another checkpoint")


def _shape(where: Path, name: str, found: list[int], fits: list[int]) -> CheckpointError:
    return _problem(
        "E-STATE-SHAPE",
        f"{name} has another shape in the checkpoint",
        where,
        str(found),
        str(fits),
        "resume with the config that the checkpoint was made with",
    )


def _problem(code: str, what: str, where: Path, found: str, fits: str, remedy: str) -> CheckpointError:
    return CheckpointError(Problem(code, what, where=str(where), found=found, fits=fits, remedy=remedy))
