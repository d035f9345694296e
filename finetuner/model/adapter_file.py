"""An adapter's folder as peft writes it: its names, and the tensors in its file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetuner.errors import ModelError, Problem
from finetuner.model.folder import read_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the base's own names."""
BESIDE = ("lora_", "token_adapter", "ia3_", "hada_", "lokr_")
"""In the names of what adapters put beside the base's own tensors."""
SAVED, ORIGINAL = ".modules_to_save.", ".original_module."


def read_weights(file: Path, code: str) -> dict[str, Tensor]:
    """The tensors in `file` by name.

    Of a module that trained whole in a grown vocabulary, peft writes the weights twice and the untrained ones besides;
    here they are there once.

    Raises: ModelError with `code` where it cannot be read.
    """
    try:
        held: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        what, fits = "the adapter's weights cannot be read", f"{WEIGHTS} as peft writes it"
        remedy = "give an adapter that was saved whole; a pickle (.bin) is not read"
        raise ModelError(Problem(code, what, str(file), str(error), fits, remedy)) from error
    doubles = {name for name in held if SAVED in name and name.replace(SAVED, ".") in held}
    doubles |= {name for name in held if ORIGINAL in name and name.replace(ORIGINAL, SAVED) in doubles}
    return {name: tensor for name, tensor in held.items() if name not in doubles}


def holds_matrices(file: Path) -> bool:
    """Whether whole tensors of the base lie in `file`: modules that trained, or copies of the embedding."""
    names = read_names(file) if file.exists() else ()
    return any(not any(mark in name for mark in BESIDE) for name in names)
