"""A model without weights, made of its config alone: what a run asks of a model's parts is known wrong at once."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.errors import ModelError, Problem
from finetuner.model.checkpointing import check_layers
from finetuner.model.freeze import freeze
from finetuner.model.quiet import quiet
from finetuner.model.soundness import first_line
from finetuner.model.targets import check_names
from finetuner.model.tiled import tileable


def check_parts(model: CausalLM, config: PreTrainedConfig) -> None:
    """Refuses what the config asks of parts that the model does not have: adapter, `freeze`, checkpointing, tiles.

    Raises: ModelError.
    """
    of_layers = type(model.checkpointing) is int or model.offload or model.tiled_mlp is not None
    if model.adapter is None and not model.freeze and not of_layers:
        return
    sketch = sketch_of(config)
    if model.adapter is not None:
        check_names(sketch, model.adapter)
    freeze(sketch, model.freeze)
    check_layers(sketch, model)
    if model.tiled_mlp is not None:
        tileable(sketch)


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
