"""Low-rank adapters beside frozen weights, through peft.

- A target that matches nothing is an error with a suggestion, each one; peft accepts a typo beside a right name.
- A file's weights go into parameters that are float32 already: no bit of them is lost beside a bfloat16 base.
- What trains is float32, whatever the base is held in; what flows through it is what autocast computes in. (peft would
  keep a float32 copy of every layer's input besides.)
- New tokens train as single rows (`trainable_token_indices`): small, right for tied matrices, and loaded by plain peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.errors import ModelError, Problem
from finetuner.model.adapter_file import CONFIG, PREFIX, WEIGHTS, read_weights
from finetuner.model.folder import read_json
from finetuner.model.quiet import quiet
from finetuner.model.soundness import describe, first_line, not_finite, some
from finetuner.model.targets import all_linear, check_names, covered, plain_matrices, token_rows
from finetuner.runtime.log import warn

IN_LAYERS = ("LORA", "IA3", "LOHA", "LOKR")
"""Kinds of peft's adapters that lie wholly in the layers, so that the model around them generates as it is."""


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
    left = plain_matrices(model) if lora.targets == "all-linear" else []
    if left:
        warn(f"all-linear gives no adapter to matrices that are no layers of their own: {some(left)}")
    with quiet():
        if lora.start is None:
            adapted = injected(model, config)
        else:
            adapted = go_on(model, Path(lora.start), config, base_name(source))
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


def injected(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`model` with new adapters that train, in float32."""
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def go_on(model: PreTrainedModel, folder: Path, config: LoraConfig, base: str) -> PeftModel:
    """`model` with the adapter in `folder`, which trains on.

    Raises: ModelError where it is not the adapter that the config describes, or not wholly there.
    """
    check_files(folder, "E-LORA-START", "model.adapter.start")
    check_agrees(model, read_json(folder / CONFIG), config, folder, base)
    own = LoraConfig.from_pretrained(folder)
    own.inference_mode, own.lora_dropout = False, config.lora_dropout
    adapted = injected(model, own)
    held = read_weights(folder / WEIGHTS, "E-LORA-START")
    wrong = fill(adapted, held)
    wrong += [f"{name} left over" for name in sorted(held.keys() - wanted_by(adapted).keys())]
    if wrong:
        raise unfit("E-LORA-START", folder, wrong)
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter in `folder`, whoever made it, for answering: nothing trains.

    Raises: ModelError where it is of another kind, or does not fit the model wholly.
    """
    check_files(folder, "E-ADAPTER-FIT", str(folder))
    values = read_json(folder / CONFIG)
    kind = values.get("peft_type")
    if kind not in IN_LAYERS or values.get("alora_invocation_tokens"):
        found = f"peft_type {kind}" if kind not in IN_LAYERS else "LoRA that waits for tokens (alora_invocation_tokens)"
        raise ModelError(
            Problem(
                "E-ADAPTER-FORM",
                "this kind of adapter is not loaded here",
                str(folder / CONFIG),
                found,
                ", ".join(IN_LAYERS),
                "use it with the program that made it",
            )
        )
    held = read_weights(folder / WEIGHTS, "E-ADAPTER-FIT")
    try:
        with quiet():
            config = PeftConfig.from_pretrained(folder)
            fit_rows(model, held)
            config.inference_mode = False  # until its parameters are float32: see `injected`
            adapted = injected(model, config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # what peft says of names that match nothing
        raise unfit("E-ADAPTER-FIT", folder, [first_line(error)]) from error
    unknown = sorted(name for name in values.keys() - config.to_dict().keys() if values[name])
    if unknown:
        warn(f"the adapter {folder} was made by another peft; not understood and left out: {', '.join(unknown)}")
    with quiet():
        wrong = fill(adapted, held)
    if wrong:
        raise unfit("E-ADAPTER-FIT", folder, wrong)
    adapted.requires_grad_(False)
    return adapted.eval()


def check_files(folder: Path, code: str, where: str) -> None:
    """Refuses a folder that is no adapter's."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            what, remedy = "the adapter's folder is not complete", "give the folder of an adapter"
            raise ModelError(Problem(code, what, where, f"no {name} in {folder}", remedy=remedy))


def fit_rows(model: PreTrainedModel, held: Mapping[str, Tensor]) -> None:
    """Gives embedding and head as many rows as the file's own copies of them have: its vocabulary had grown."""
    matrices = [
        part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None
    ]
    sizes: dict[int, int] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        module = path.removesuffix(".weight")
        for name in (f"{PREFIX}{module}.weight", f"{PREFIX}{module}.base_layer.weight"):
            if name in held and any(parameter is matrix for matrix in matrices):
                sizes[id(parameter)] = len(held[name])
    rows = set(sizes.values())
    if len(sizes) == len({id(matrix) for matrix in matrices}) and len(rows) == 1 and rows != {len(matrices[0])}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def wanted_by(adapted: PeftModel) -> dict[str, Tensor]:
    """The tensors that the adapter's file must hold, by their names in it."""
    wanted: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return wanted


def fill(adapted: PeftModel, held: Mapping[str, Tensor]) -> list[str]:
    """Copies the tensors of a file into the adapter; what is wrong with them, in words.

    Copies of the base's embedding, which peft adds to some files, go into the base.
    """
    wanted = wanted_by(adapted)
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - held.keys())]
    wrong += [
        describe((name, held[name].shape, wanted[name].shape))
        for name in sorted(wanted.keys() & held.keys())
        if held[name].shape != wanted[name].shape
    ]
    wrong += [f"{name} is no finite number throughout" for name in not_finite(held.items())]
    if wrong:
        return wrong
    try:
        result = set_peft_model_state_dict(adapted, dict(held))
    except RuntimeError as error:  # a copy of the embedding, of another shape
        return [first_line(error)]
    return [f"{name} matches nothing" for name in sorted(result.unexpected_keys)]


def unfit(code: str, folder: Path, wrong: list[str]) -> ModelError:
    what, remedy = (
        "the adapter's weights do not fit",
        "give the base that it was trained on, and an adapter saved whole",
    )
    return ModelError(Problem(code, what, str(folder), some(wrong), "each tensor of its config, and no other", remedy))


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


def differs(field: str, found: Any, fits: Any, folder: Path) -> Problem:
    return Problem(
        "E-LORA-START",
        f"the adapter to go on from has another {field}",
        f"model.adapter ({folder})",
        str(found),
        str(fits),
        f"model.adapter with the {field} of the folder",
    )
