"""A model made from a transformers config and random weights, the same for the same seed."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.config.model import Fresh
from finetuner.errors import ModelError, Problem
from finetuner.model.quiet import quiet
from finetuner.model.soundness import check_frequencies, first_line


def make_fresh(fresh: Fresh, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> PreTrainedModel:
    """A model with random float32 weights, the same for the same seed; torch's own generator stays where it was.

    Raises: ModelError.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = fresh_config(fresh, special | {"vocab_size": vocabulary})
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(fresh.seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        IndexError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        raise refused_config(error) from error
    check_frequencies(model)
    return model


def fresh_config(fresh: Fresh, follows: dict[str, Any]) -> PreTrainedConfig:
    """transformers' config of a `Fresh` model; `follows` is what follows the tokenizer unless the config says it.

    Raises: ModelError.
    """
    values = follows | dict(fresh.config)
    if "vocab_size" in follows and values["vocab_size"] < follows["vocab_size"]:
        values["vocab_size"] = follows["vocab_size"]
    kind = values.pop("model_type")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise refused_config(error) from error
    return config


def refused_config(error: Exception) -> ModelError:
    what, remedy = "no model can be made of this config", "see transformers' config of that model_type"
    return ModelError(Problem("E-MODEL-FRESH", what, "Fresh.config", first_line(error), remedy=remedy))
