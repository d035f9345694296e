"""Checks of a model that has just been loaded: that it is wholly its files, finite, and with the right frequencies.

- transformers makes missing weights up and leaves unknown ones out, with a report; here both are errors.
- A cast of the whole model rounds the rotary frequencies; wrong ones are an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from finetuner.errors import ModelError, Problem


def check_keys(info: dict[str, Any], folder: Path) -> None:
    """Refuses a model that is not wholly its files, and files that are not wholly the model."""
    problems = []
    for code, what, key in (
        ("E-MODEL-MISSING", "weights that the model needs are not in its files", "missing_keys"),
        ("E-MODEL-UNEXPECTED", "the files hold weights that the model has no place for", "unexpected_keys"),
        ("E-MODEL-SHAPE", "weights are of another shape than the config says", "mismatched_keys"),
        ("E-MODEL-LOAD", "weights could not be loaded", "error_msgs"),
    ):
        names = sorted(describe(item) for item in info.get(key, ()))
        if names:
            remedy = "fetch the model again; look whether config.json belongs to these files"
            problems.append(Problem(code, what, str(folder), some(names), remedy=remedy))
    if problems:
        raise ModelError(*problems)


def describe(item: Any) -> str:
    """A key, or a key with both shapes."""
    if isinstance(item, tuple):
        name, found, fits = item
        return f"{name} is {tuple(found)}, {tuple(fits)} fits"
    return str(item)


def check_finite(named: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuses NaN and infinity in a base."""
    check_names(not_finite(named), where)


def check_names(wrong: list[str], where: str) -> None:
    """Refuses a base in which the weights `wrong` are not finite."""
    if wrong:
        what, remedy = (
            "the model has weights that are no finite numbers",
            "fetch the model again, or give one that is sound",
        )
        raise ModelError(Problem("E-MODEL-NAN", what, where, some(wrong), remedy=remedy))


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    sound = {
        name: torch.stack(torch.aminmax(tensor)).float().isfinite().all()
        for name, tensor in named
        if tensor.is_floating_point() and tensor.numel()
    }
    return [name for name, fine in sound.items() if not bool(fine)]


def some(names: list[str]) -> str:
    """The first four, and how many more there are."""
    return "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_frequencies(model: nn.Module) -> None:
    """Makes sure that each rotary embedding holds what its formula gives, in float32."""
    for name, module in model.named_modules():
        kept = dict(module.named_buffers(recurse=False))
        if "inv_freq" not in kept or not isinstance(getattr(module, "config", None), PreTrainedConfig):
            continue
        right = dict(type(module)(config=module.config).named_buffers(recurse=False))["inv_freq"]
        frequencies = kept["inv_freq"]
        sound = frequencies.dtype == torch.float32 and torch.allclose(frequencies.cpu(), right.cpu(), rtol=1e-7, atol=0)
        if not sound:
            raise ModelError(
                Problem(
                    "E-MODEL-ROPE",
                    "the rotary frequencies are not what their formula gives",
                    name,
                    f"{frequencies.dtype}",
                    "torch.float32",
                    "load the model with another version of transformers",
                )
            )


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Refuses rows longer than the positions that the model was made for.

    Raises: ModelError.
    """
    limit = positions(config)
    if limit is not None and length > limit:
        raise ModelError(
            Problem(
                "E-LENGTH",
                "rows are longer than the model has positions",
                "data.length",
                str(length),
                f"up to {limit}",
                f"data.length={limit}, or a model with rope scaling",
            )
        )


def positions(config: PreTrainedConfig) -> int | None:
    """Positions that the model can tell apart, rope scaling counted; None where its config sets no bound."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is None or not isinstance(rope, dict) or rope.get("rope_type", "default") == "default":
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * float(rope.get("factor") or 1.0)))


def first_line(error: BaseException) -> str:
    """What an error says, on one line; transformers' config errors have the cause on their second."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
