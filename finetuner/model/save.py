"""A learner -> a folder that plain transformers, or plain peft, loads.

- Float32 masters are cast to the dtype of the model that training began with; ties stay ties.
- The token that ends an answer travels in generation_config.json, so that others stop where training stopped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.model.quiet import quiet
from finetuner.model.soundness import not_finite, some
from finetuner.model.tokenizer import stop_ids

ORIGINALS = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that other programs convert a tokenizer from; transformers itself no longer writes them."""


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
    config = folder / "config.json"
    values = json.loads(config.read_text("utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")  # transformers notes the masters' float32
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


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
    before = values.eos_token_id
    known = [] if before is None else [before] if isinstance(before, int) else list(before)
    ends = list(dict.fromkeys([*stop_ids(tokenizer), *known]))
    values.eos_token_id = ends[0] if len(ends) == 1 else ends
    # Not save_pretrained: it refuses the contradictions that many models' own files hold. Nor may the file say that it
    # came of config.json: transformers would then make it again from there, and lose the ends.
    written = {name: value for name, value in values.to_diff_dict().items() if name != "_from_model_config"}
    (folder / "generation_config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


def tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The tokenizer with its template, and the original's files beside."""
    tokenizer.save_pretrained(folder)
    for name in ORIGINALS:
        original = Path(tokenizer.name_or_path) / name
        if original.is_file() and not (folder / name).exists():
            shutil.copyfile(original, folder / name)


def readable(folder: Path) -> None:
    """Lets others read the files: safetensors writes them for their owner alone."""
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
