"""What an adapter's file changes in its base, tensor by tensor.

    base_model.model.MODULE.lora_A.weight, .lora_B.weight   W + scale B A                   (arXiv:2106.09685)
    ... and .lora_magnitude_vector                          m (W + scale B A) / |W + scale B A| a row (arXiv:2402.09353)
    MODULE.lora_embedding_A, .lora_embedding_B              W + scale (B A)^T
    MODULE.token_adapter.trainable_tokens_delta             those rows are replaced
    MODULE.weight                                           the whole tensor is replaced (modules_to_save)
    MODULE.base_layer.weight                                W itself is another one: a copy of an embedding that grew

- Sums are in float32, whatever the base is stored in.
- What is not understood is refused: an adapter is merged whole or not at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import torch
from torch import Tensor

from finetuner.errors import ModelError, Problem
from finetuner.model.adapter_file import PREFIX, WEIGHTS, read_weights

ENDS = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|lora_embedding_[AB]|"
                  r"token_adapter\.trainable_tokens_delta|weight|bias)$")  # fmt: skip
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False,), "alora_invocation_tokens": (None,), "arrow_config": (None,),
    "layer_replication": (None,), "target_parameters": (None, []), "use_bdlora": (None, False),
    "use_qalora": (False,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
}  # fmt: skip
"""Settings of peft under which the formulas above do not hold, and the values under which they do."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scale B A; `down_RI` is A, `up_OR` is B. `transposed`: the base keeps W as (in, out)."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None
    transposed: bool = False
    copied: Tensor | None = None
    """W, where it is not the base's."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Another tensor in place of the base's."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Other rows in place of those of that number."""

    numbers: tuple[int, ...]
    rows_ND: Tensor


Change: TypeAlias = LowRank | Whole | Rows


def apply(change: Change, weight: Tensor, name: str) -> Tensor:
    """The changed tensor, in float32.

    Raises: ModelError where the shapes do not fit.
    """
    match change:
        case LowRank(down_RI, up_OR, scale, magnitude_O, transposed, copied):
            if copied is not None:
                check_shape(name, copied, weight)
                weight = copied
            delta = up_OR.float() @ down_RI.float() * scale
            delta = delta.T if transposed else delta
            check_shape(name, delta, weight)
            total = weight.float() + delta
            if magnitude_O is None:
                return total
            norms_O1 = total.norm(dim=1, keepdim=True)
            changed: Tensor = magnitude_O.float()[:, None] / norms_O1 * total
            return changed
        case Whole(tensor):
            check_shape(name, tensor, weight)
            return tensor.float()
        case Rows(numbers, rows_ND):
            if max(numbers) >= weight.shape[0] or rows_ND.shape != (len(numbers), weight.shape[1]):
                raise unfit(name, f"rows {list(numbers)[:4]} of {list(rows_ND.shape)}", list(weight.shape))
            return weight.float().index_copy(0, torch.tensor(numbers), rows_ND.float())
        case _:
            assert_never(change)


def whole_of(change: Change | None) -> Tensor | None:
    """The tensor that takes the place of the base's, before anything is added to it."""
    match change:
        case Whole(tensor):
            return tensor
        case LowRank(copied=tensor):
            return tensor
        case Rows() | None:
            return None
        case _:
            assert_never(change)


def read_changes(folder: Path, config: Mapping[str, Any]) -> dict[str, Change]:
    """The changes of the adapter in `folder` by the name of the base's tensor.

    Raises: ModelError where the adapter is empty, not finite, or of a form that is not understood.
    """
    check_form(folder, config)
    parts = read_parts(folder / WEIGHTS)
    changes: dict[str, Change] = {}
    for module, own in parts.items():
        kinds = set(own)
        rows = own.get("token_adapter.trainable_tokens_delta")
        if kinds == {"lora_A.weight", "lora_B.weight"} or kinds == {"lora_A.weight", "lora_B.weight", "magnitude"}:
            down, up, magnitude = own["lora_A.weight"], own["lora_B.weight"], own.get("magnitude")
            if magnitude is not None and config.get("fan_in_fan_out"):
                raise refused(folder, f"{module}: DoRA on a transposed weight")
            scale = scaling(config, module, down.shape[0])
            changes[f"{module}.weight"] = LowRank(down, up, scale, magnitude, bool(config.get("fan_in_fan_out")))
        elif kinds == {"lora_embedding_A", "lora_embedding_B"}:
            down, up = own["lora_embedding_A"], own["lora_embedding_B"]
            changes[f"{module}.weight"] = LowRank(down, up, scaling(config, module, down.shape[0]), transposed=True)
        elif rows is not None and len(kinds) == 1:
            changes[f"{module}.weight"] = Rows(row_numbers(config, module), rows)
        elif kinds <= {"weight", "bias"}:
            changes |= {f"{module}.{kind}": Whole(tensor) for kind, tensor in own.items()}
        else:
            raise refused(folder, f"{module}: {', '.join(sorted(kinds))}")
    return on_copies(changes)


def on_copies(changes: dict[str, Change]) -> dict[str, Change]:
    """The changes, with those of a layer whose own weight lies in the file made on that weight."""
    end = ".base_layer.weight"
    joined = {name: change for name, change in changes.items() if not name.endswith(end)}
    for name, copy in changes.items():
        target = name.removesuffix(end) + ".weight"
        own = joined.get(target)
        if name.endswith(end) and isinstance(copy, Whole) and isinstance(own, LowRank):
            joined[target] = replace(own, copied=copy.tensor)
        elif name not in joined:
            joined[name] = copy
    return joined


def read_parts(file: Path) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by module and kind: {"lm_head": {"lora_A.weight": ...}}."""
    held = read_weights(file, "E-ADAPTER-FILE")
    if not held:
        raise ModelError(Problem("E-ADAPTER-EMPTY", "the adapter holds no tensors", str(file), "0 tensors",
                                 remedy="give a checkpoint that was saved whole"))  # fmt: skip
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            found = "empty" if tensor.numel() == 0 else "NaN or infinity in it"
            raise ModelError(Problem("E-ADAPTER-TENSOR", f"{name} cannot be merged", str(file), found,
                                     "finite numbers", "give an older checkpoint"))  # fmt: skip
        end = ENDS.search(name)
        if not name.startswith(PREFIX) or end is None:
            raise refused(file, f"a tensor named {name}")
        kind = "magnitude" if "magnitude" in end[1] else end[1]
        parts.setdefault(name[len(PREFIX) : end.start()], {})[kind] = tensor
    return parts


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) under rslora; a pattern of the config may set the module's own alpha."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def row_numbers(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows that train in `module`, in the order of its tensor."""
    rows = config.get("trainable_token_indices") or {}
    if isinstance(rows, dict):
        rows = next((numbers for name, numbers in rows.items() if module == name or module.endswith(f".{name}")), [])
    return tuple(int(number) for number in rows)


def check_form(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses kinds of adapters whose formula is another one."""
    if config.get("peft_type") != "LORA":
        raise refused(folder, f"peft_type {config.get('peft_type')}")
    for key, values in PLAIN.items():
        if key in config and config[key] not in values:
            raise refused(folder, f"{key}={config[key]!r}")


def refused(where: Path, found: str) -> ModelError:
    return ModelError(Problem("E-ADAPTER-FORM", "this form of adapter is not merged here", str(where), found,
                              "LoRA, rsLoRA, DoRA, modules_to_save, trained token rows",
                              "merge it with the program that made it"))  # fmt: skip


def check_shape(name: str, change: Tensor, weight: Tensor) -> None:
    if change.shape != weight.shape:
        raise unfit(name, str(list(change.shape)), list(weight.shape))


def unfit(name: str, found: str, fits: list[int]) -> ModelError:
    return ModelError(Problem("E-MERGE-SHAPE", "the adapter does not fit its base", name, found, str(fits),
                              "give the base that it was trained on: --base FOLDER"))  # fmt: skip
