"""Low-rank adapters beside frozen weights, through peft.

- A target that matches nothing is an error with a suggestion, each one; peft accepts a typo beside a right name.
- What trains is float32, whatever the base is held in; what flows through it is what autocast computes in. (peft would
  keep a float32 copy of every layer's input besides.)
- New tokens train as single rows (`trainable_token_indices`): small, right for tied matrices, and loaded by plain peft.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetuner.config.model import CausalLM, LoRA
from finetuner.errors import ModelError, Problem, nearest
from finetuner.model.quiet import quiet
from finetuner.runtime.log import warn


def add_adapter(model: PreTrainedModel, source: CausalLM, new_ids: tuple[int, ...]) -> PeftModel:
    """`model` with the adapter that `source` asks for; the rows of `new_ids` train along with it.

    Raises: ModelError.
    """
    lora = source.adapter
    assert lora is not None
    check_names(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=all_linear(model) if lora.targets == "all-linear" else sorted(lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=token_rows(model, lora, new_ids),
    )
    with quiet():
        if lora.start is None:
            adapted = get_peft_model(model, config)
        else:
            adapted = go_on(model, Path(lora.start), config, base_name(source))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if source.dtype != "float32" and not lora.dora:  # DoRA's norms are taken in float32
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
    active = adapted.peft_config[adapted.active_adapter]
    active.base_model_name_or_path, active.revision = base_name(source), source.revision
    return adapted


def base_name(source: CausalLM) -> str:
    """By which name the adapter's base is found again: a folder by its absolute path."""
    path = Path(str(source.path)).expanduser()
    return str(path.resolve()) if path.is_dir() else str(source.path)


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
        return Problem("E-LORA-TARGET", f"{name} is no linear layer", where, kind, ", ".join(all_linear(model)))
    return None


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


def go_on(model: PreTrainedModel, folder: Path, config: LoraConfig, base: str) -> PeftModel:
    """`model` with the adapter in `folder`, which trains on.

    Raises: ModelError where it is not the adapter that the config describes, or not wholly there.
    """
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (file, weights):
        if not needed.exists():
            raise ModelError(
                Problem(
                    "E-LORA-START",
                    "the adapter's folder is not complete",
                    "model.adapter.start",
                    f"no {needed.name} in {folder}",
                    remedy="give the folder of an adapter",
                )
            )
    check_agrees(model, json.loads(file.read_text("utf-8")), config, folder, base)
    held = load_file(weights)
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong = sorted(wanted.keys() ^ held.keys())
    wrong += sorted(name for name, part in held.items() if not part.numel() or not bool(part.isfinite().all()))
    if wrong:
        raise ModelError(
            Problem(
                "E-LORA-START",
                "the adapter's weights are not those of its config",
                str(weights),
                f"missing, left over, empty or not finite: {', '.join(wrong[:4])}",
                remedy="give an adapter that was saved whole",
            )
        )
    return adapted


def check_agrees(model: PreTrainedModel, held: dict[str, Any], config: LoraConfig, folder: Path, base: str) -> None:
    """Refuses to go on from an adapter of another form; warns where it names another base."""
    problems = []
    for field, key in (("rank", "r"), ("alpha", "lora_alpha"), ("rslora", "use_rslora"), ("dora", "use_dora")):
        if held.get(key, False) != getattr(config, key):
            problems.append(differs(field, held.get(key), getattr(config, key), folder))
    targets = held.get("target_modules") or ()
    if isinstance(targets, str) or covered(model, targets) != covered(model, config.target_modules):
        problems.append(differs("targets", targets, sorted(config.target_modules), folder))
    if sorted(held.get("modules_to_save") or ()) != sorted(config.modules_to_save or ()):
        problems.append(differs("modules_to_save", held.get("modules_to_save"), config.modules_to_save, folder))
    if (held.get("trainable_token_indices") or None) != config.trainable_token_indices:
        found, fits = held.get("trainable_token_indices"), config.trainable_token_indices
        problems.append(differs("new tokens", found, fits, folder))
    if problems:
        raise ModelError(*problems)
    if held.get("base_model_name_or_path") != base:
        warn(f"the adapter {folder} names {held.get('base_model_name_or_path')} as its base, the config names {base}")


def covered(model: PreTrainedModel, targets: Any) -> set[str]:
    """Names of all modules that `targets` match."""
    return {name for target in targets for name in matching(model, target)}


def differs(field: str, found: Any, fits: Any, folder: Path) -> Problem:
    return Problem(
        "E-LORA-START",
        f"the adapter to go on from has another {field}",
        f"model.adapter ({folder})",
        str(found),
        str(fits),
        f"model.adapter with the {field} of the folder",
    )
