"""An optimizer of plain torch gets the state back that was saved, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetuner.engine.saved import Saved, open_state
from finetuner.engine.state import BY_ELEMENT, named_parameters
from finetuner.engine.unfit import check_names, check_shape


def load_state(folder: Path, optimizer: Optimizer) -> dict[str, Tensor]:
    """Gives every parameter of `optimizer` the state saved under its name; returns the trained weights by name.

    Raises:
        CheckpointError: E-STATE-NAMES, E-STATE-SHAPE, E-STATE-OPTIMIZER, ...: it is another model's or torn.
    """
    saved = open_state(folder)
    named = list(named_parameters(optimizer))
    saved.check(type(optimizer).__name__, {name: parameter.shape for name, parameter, _ in named})
    for name, parameter, group in named:
        state: dict[str, Any] = dict(saved.parameters[name]["numbers"])
        for key in saved.states(name):
            value = moment(saved, key, name)
            # torch keeps the step on the CPU, unless the fused or capturable kernel reads it on the device.
            stays = key == "step" and not (group.get("fused") or group.get("capturable"))
            state[key] = value if stays else _placed(optimizer, parameter, key, value)
        if state:
            optimizer.state[parameter] = state
    return masters(saved)


def moment(saved: Saved, key: str, name: str) -> Tensor:
    """The whole of one state of one parameter."""
    if key in BY_ELEMENT:
        return saved.moment(key, name, 0, saved.numel(name)).reshape(saved.parameters[name]["shape"])
    return saved.single(key, name)


def masters(saved: Saved) -> dict[str, Tensor]:
    """The trained weights, whole, by name."""
    return {
        name: saved.master(name, 0, saved.numel(name)).reshape(entry["shape"])
        for name, entry in saved.parameters.items()
    }


def load_weights(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Copies the trained weights saved in `folder` into `targets`, strictly by name and shape."""
    give(folder, masters(open_state(folder)), targets)


def give(where: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copies each of `tensors` into the one of `targets` that bears its name, if names and shapes are the same."""
    check_names(where, "weights", tensors, targets)
    for name, target in targets.items():
        check_shape(where, name, tensors[name].shape, target.shape)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _placed(optimizer: Optimizer, parameter: torch.nn.Parameter, key: str, value: Tensor) -> Tensor:
    """`value` on the parameter's device; where bitsandbytes pages the moments, in a page of its own."""
    if key in ("state1", "state2") and getattr(optimizer, "is_paged", False):
        page: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
        return page.copy_(value)
    return value.to(parameter.device)
