"""Which parts of a model an adapter's names mean, and what is wrong with names that mean nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetuner.config.model import LoRA
from finetuner.errors import ModelError, Problem, nearest
from finetuner.model.shards import shape_of


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's linear layers by name, 4-bit ones too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def all_linear(model: PreTrainedModel) -> list[str]:
    """Last names of the linear layers but the head: ["down_proj", ..., "v_proj"]."""
    head = model.get_output_embeddings()
    return sorted({name.rpartition(".")[2] for name, module in linears(model).items() if module is not head})


def matching(model: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """The modules that `target` names: those called so, or whose path ends so."""
    return {name: m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")}


def check_names(model: PreTrainedModel, lora: LoRA) -> None:
    """Refuses targets and modules_to_save that name nothing, or what cannot be adapted."""
    targets = () if lora.targets == "all-linear" else lora.targets
    problems = []
    for field, names in (("targets", targets), ("modules_to_save", lora.modules_to_save)):
        for name in names:
            problem = problem_of(model, field, name)
            if problem is not None:
                problems.append(problem)
    if problems:
        raise ModelError(*problems)


def problem_of(model: PreTrainedModel, field: str, name: str) -> Problem | None:
    """What is wrong with `name` in the LoRA's `field`, if anything."""
    where, found = f"model.adapter.{field}", matching(model, name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not found:
        last = sorted({full.rpartition(".")[2] for full, m in model.named_modules() if full and not full[-1].isdigit()})
        fits = [*all_linear(model), "lm_head"] if field == "targets" else last
        best = nearest(name, last)
        remedy = f"did you mean {best}?" if best else "name some of these"
        return Problem("E-LORA-TARGET", f"{name} matches no module", where, name, ", ".join(fits), remedy)
    tied = head is not None and head.weight is embedding.weight
    if tied and any(module is head or module is embedding for module in found.values()):
        other = "embedding" if any(module is head for module in found.values()) else "head"
        return Problem(
            "E-LORA-TIED",
            f"{name} is one matrix with the model's {other}",
            where,
            "tie_word_embeddings=True",
            ", ".join(all_linear(model)),
            "leave it out, or train the weights themselves: adapter=None",
        )
    if field == "targets" and not any(isinstance(m, nn.Linear | Conv1D | nn.Embedding) for m in found.values()):
        kind = type(next(iter(found.values()))).__name__
        fitting = ", ".join(all_linear(model))
        return Problem("E-LORA-TARGET", f"{name} is no linear layer", where, kind, fitting, "name some of these")
    return None


def plain_matrices(model: PreTrainedModel) -> list[str]:
    """Matrices that are no layer of their own, such as the fused experts of a mixture: ["experts.down_proj", ...].

    "all-linear" means layers, so these get no adapter.
    """
    layers = (nn.Linear, nn.Embedding, Conv1D, nn.modules.conv._ConvNd)
    return sorted({
        ".".join([*path.split(".")[-1:], name])
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) >= 2 and not isinstance(module, layers)
    })  # fmt: skip


def covered(model: PreTrainedModel, targets: Any) -> set[str]:
    """Names of all modules that `targets` match."""
    return {name for target in targets for name in matching(model, target)}


def token_rows(model: PreTrainedModel, lora: LoRA, new_ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    """Which rows of which matrices train for the new tokens; peft ties the head's to the embedding's where they are."""
    if not new_ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    rows = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if any(module is matrix for matrix in matrices) and last not in lora.modules_to_save:
            rows[last] = list(new_ids)
    return rows or None
