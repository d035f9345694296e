"""Pretrained weights -> a model in memory, or an error that says why not; nothing is ever newly made up in silence.

- Full training holds float32 weights and computes through autocast; beside an adapter the frozen base is held in the
  compute dtype, or in 4 bits (NF4).
- What is missing, left over, of another shape, or not finite is told by name: see `soundness.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.config.model import NF4, CausalLM, Fresh
from finetuner.errors import ModelError, Problem
from finetuner.model import internlm2
from finetuner.model.folder import model_folder, read_config, sizes, tensors
from finetuner.model.fresh import make_fresh
from finetuner.model.quiet import quiet
from finetuner.model.shards import WHOLE, Shards
from finetuner.model.soundness import (
    check_finite,
    check_frequencies,
    check_keys,
    check_names,
    describe,
    first_line,
    not_finite,
)
from finetuner.model.vocabulary import fit_vocabulary
from finetuner.runtime.dist import gathered
from finetuner.runtime.log import say


def load_weights(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    new_ids: tuple[int, ...],
    device: torch.device,
    shards: Shards = WHOLE,
) -> PreTrainedModel:
    """The model on `device`, with a row for each of the tokenizer's `vocabulary` ids; `new_ids` are those just added.

    Raises: ModelError.
    """
    if isinstance(model.path, Fresh):
        return make_fresh(model.path, tokenizer, vocabulary).to(device)
    folder = model_folder(model)
    if model.remote_code is not None and needs_code(read_config(folder)):
        code = ", ".join(sorted(file.name for file in folder.glob("*.py")))
        say(f"runs the code of {model.path} at {model.remote_code}: {code}")
    with quiet(), shards.loading(storage(model)):
        loaded, info = read_model(folder, model, device, cut=shards.cuts)
    check_keys(together(info) if shards.cuts else info, folder)
    if model.quant is not None:
        check_packed(loaded, str(folder))
        keep_exact(loaded)
    if shards.cuts:
        check_names(
            sorted({name for names in gathered(not_finite(shards.held(loaded))) for name in names}), str(folder)
        )
    elif model.quant is None:
        check_finite(loaded.named_parameters(), str(folder))
    else:
        check_finite(tensors(folder), str(folder))
    fit_vocabulary(loaded, vocabulary, new_ids)
    check_frequencies(loaded)
    return loaded


def storage(model: CausalLM) -> torch.dtype:
    """What the weights are held in: trained ones in float32, frozen ones in what is computed in."""
    return torch.float32 if model.adapter is None else compute(model)


def compute(model: CausalLM) -> torch.dtype:
    """What the forward and backward passes compute in."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[model.dtype]


def together(info: dict[str, Any]) -> dict[str, Any]:
    """What any rank has to say of the loading: only the main rank reads the files."""
    told = gathered({key: sorted(map(describe, value)) for key, value in info.items()})
    return {key: {item for one in told for item in one.get(key, ())} for key in info}


def read_model(
    folder: Path, model: CausalLM, device: torch.device, *, cut: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' account of its loading; `cut` where its weights go to several ranks."""
    options: dict[str, Any] = {
        "dtype": storage(model),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "use_safetensors": True,
    }
    if model.quant is not None:
        options["quantization_config"] = four_bits(model.quant, compute(model))
    if not cut and (model.quant is not None or device.type != "cpu"):
        options["device_map"] = {"": device}
    config = read_hf_config(folder, model)
    try:
        if internlm2.is_model(read_config(folder)):
            return internlm2.read_model(folder, config, options)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=needs_code(read_config(folder)), **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        remedy = "see that its files belong together, or fetch it again; --debug shows where it failed"
        problem = Problem("E-MODEL-LOAD", "the model cannot be loaded", str(folder), first_line(error), remedy=remedy)
        raise ModelError(problem) from error
    return loaded, info


def read_hf_config(folder: Path, model: CausalLM) -> PreTrainedConfig:
    """The folder's config as transformers' own class.

    Raises: ModelError.
    """
    values = read_config(folder)
    if internlm2.is_model(values):
        return internlm2.read_config(values)
    known = not needs_code(values)
    if not known and model.remote_code is None:
        remedy = "upgrade transformers, or give another model"
        if "auto_map" in values:
            remedy = 'read the code; name the commit that may run: remote_code="<40 hex digits>"'
        raise ModelError(
            Problem(
                "E-MODEL-CODE",
                "transformers does not know this kind of model",
                str(folder / "config.json"),
                f"model_type {values['model_type']!r}",
                "a model that needs no code of its folder",
                remedy,
            )
        )
    if not known and Path(str(model.path)).is_dir() and has_own_code(values):
        raise ModelError(
            Problem(
                "E-MODEL-CODE",
                "code in a local folder has no commit by which to trust it",
                str(folder),
                fits="a hub name with remote_code=COMMIT",
                remedy="give the model's hub name",
            )
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=not known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        what, where = "config.json does not fit its model_type", str(folder / "config.json")
        remedy = "fetch the model's config.json again"
        raise ModelError(Problem("E-MODEL-CONFIG", what, where, first_line(error), remedy=remedy)) from error
    # An encoder (BERT) has a causal class too, whose tokens see those behind them unless it is marked as a decoder.
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if known and (type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or encoder):
        raise ModelError(
            Problem(
                "E-MODEL-KIND",
                "the model is no causal language model",
                str(folder / "config.json"),
                f"model_type {values['model_type']!r}",
                "a model that continues texts, such as llama or qwen3",
                "give such a model",
            )
        )
    return config


def needs_code(values: dict[str, Any]) -> bool:
    """Whether transformers does not know the model; of one that it knows, no folder's code ever runs."""
    return values["model_type"] not in transformers.CONFIG_MAPPING


def has_own_code(values: dict[str, Any]) -> bool:
    """Whether the config's auto_map names code in its own folder rather than in a repository ("org/name--...")."""
    return any("--" not in str(place) for place in values.get("auto_map", {}).values())


def four_bits(quant: NF4, dtype: torch.dtype) -> Any:
    """transformers' config for NF4."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quant.double_quant,
    )


def check_packed(model: nn.Module, where: str) -> None:
    """Refuses 4-bit weights of another shape than their layer's, which transformers takes in unseen."""
    from bitsandbytes.nn import Linear4bit

    wrong = [
        describe((f"{name}.weight", layer.weight.quant_state.shape, (layer.out_features, layer.in_features)))
        for name, layer in model.named_modules()
        if isinstance(layer, Linear4bit)
        and tuple(layer.weight.quant_state.shape) != (layer.out_features, layer.in_features)
    ]
    if wrong:
        check_keys({"mismatched_keys": wrong}, Path(where))


def keep_exact(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU.

    It would round their scales to bfloat16 for good: the training after an evaluation would be another one.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most of the folder's weights are in: a trained model is saved in it."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts = {names[name]: count for name, count in sizes(folder).items() if name in names}
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
