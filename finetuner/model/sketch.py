"""A model without weights, made of its config alone: what a run asks of a model's parts is known wrong at once."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.errors import ModelError, Problem
from finetuner.model.freeze import freeze
from finetuner.model.quiet import quiet
from finetuner.model.soundness import first_line
from finetuner.model.targets import check_names


def check_parts(model: CausalLM, config: PreTrainedConfig) -> None:
    """Refuses names of layers and parameters, in the adapter and in `freeze`, that the model does not have.

    Raises: ModelError.
    """
    if model.adapter is None and not model.freeze:
        return
    sketch = sketch_of(config)
    if model.adapter is not None:
        check_names(sketch, model.adapter)
    freeze(sketch, model.freeze)


def sketch_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` on torch's meta device, where tensors have shapes and no memory.

    Raises: ModelError.
    """
    try:
        with torch.device("meta"), quiet():
            sketch: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        what, remedy = "no model can be made of its config.json", "fetch the model again"
        raise ModelError(Problem("E-MODEL-CONFIG", what, "model.path", first_line(error), remedy=remedy)) from error
    return sketch
