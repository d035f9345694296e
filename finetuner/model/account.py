"""What a learner is made of: dtypes and numbers of parameters, for the log and the run's record."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from finetuner.model.shards import shape_of


class Trains(NamedTuple):
    """Numbers of parameters."""

    trained: int
    all: int


def what_trains(model: nn.Module) -> Trains:
    """Trained parameters and all of them; tied ones count once, 4-bit ones as many as they stand for."""
    sizes = [(size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Trains(sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


def dtype_table(model: nn.Module, causal: PreTrainedModel, compute: torch.dtype) -> tuple[tuple[str, str], ...]:
    """(part, dtype) of the parts that the model has; "a, b" where a part has several, the most frequent first."""
    matrices = {"embedding": set(causal.get_input_embeddings().parameters())}
    if causal.get_output_embeddings() is not None:
        matrices["head"] = set(causal.get_output_embeddings().parameters())
    parts: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        part = "trained" if parameter.requires_grad else "frozen base"
        roles = [part]
        if "norm" in name.rpartition(".")[0].rpartition(".")[2].lower():
            roles.append("norms")
        roles += [role for role, held in matrices.items() if parameter in held]
        for role in roles:
            parts.setdefault(role, Counter())[held_in(parameter)] += size(parameter)
    order = ("frozen base", "trained", "norms", "embedding", "head")
    rows = [(part, ", ".join(kind for kind, _ in parts[part].most_common())) for part in order if part in parts]
    return (*rows, ("compute", short(compute)))


def size(parameter: nn.Parameter) -> int:
    """Weights that the parameter stands for; of a 4-bit one there are two in each byte."""
    return parameter.numel() * 2 if is_packed(parameter) else shape_of(parameter).numel()


def held_in(parameter: nn.Parameter) -> str:
    return "nf4" if is_packed(parameter) else short(parameter.dtype)


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether it holds 4-bit weights."""
    return parameter.dtype == torch.uint8


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
