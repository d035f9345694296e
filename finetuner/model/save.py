"""A learner -> a folder that plain transformers, or plain peft, loads.

- Float32 masters are cast to the dtype of the model that training began with; ties stay ties.
- Config and tokenizer are written for older readers too: see `portable.py`.
- The token that ends an answer travels in generation_config.json, so that others stop where training stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.model.folder import read_json
from finetuner.model.portable import all_ends, portable_config, write_json, write_tokenizer
from finetuner.model.quiet import quiet
from finetuner.model.soundness import not_finite, some
from finetuner.model.tokenizer import stop_ids


def whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """The model's weights in `dtype`, and its config.

    Raises: ModelError where a weight is no finite number, or too large for `dtype`.
    """
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape  # the same for tied matrices
        if place not in cast:
            cast[place] = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        state[name] = cast[place]
    wrong = not_finite(state.items())
    if wrong:
        what = "weights are no finite numbers, or none that fit the model's dtype; nothing is saved"
        remedy = "start from a bfloat16 or float32 copy of the model" if dtype == torch.float16 else "lower optim.lr"
        raise ModelError(Problem("E-SAVE-NAN", what, str(folder), f"{dtype}: {some(wrong)}", remedy=remedy))
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = kept
    # transformers notes the masters' float32
    write_json(folder / "config.json", portable_config(read_json(folder / "config.json"), dtype))


def adapter(model: Any, folder: Path) -> None:
    """The adapter's float32 weights and its config, by peft.

    Raises: ModelError where a weight is no finite number.
    """
    wrong = not_finite((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if wrong:
        what = "adapter weights are no finite numbers; nothing is saved"
        raise ModelError(Problem("E-SAVE-NAN", what, str(folder), some(wrong), remedy="lower optim.lr"))
    with quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form that peft leaves to be filled in


def generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """generation_config.json as the base has it, with every id that ends an answer."""
    values = GenerationConfig(**(model.generation_config.to_dict() if model.generation_config else {}))
    values.eos_token_id = all_ends(stop_ids(tokenizer), values.eos_token_id)
    # Not save_pretrained: it refuses the contradictions that many models' own files hold. Nor may the file say that it
    # came of config.json: transformers would then make it again from there, and lose the ends.
    written = {name: value for name, value in values.to_diff_dict().items() if name != "_from_model_config"}
    write_json(folder / "generation_config.json", written)


def tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The tokenizer with its template."""
    write_tokenizer(tokenizer, [Path(tokenizer.name_or_path)], folder)


def readable(folder: Path) -> None:
    """Lets others read the files: safetensors writes them for their owner alone."""
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
