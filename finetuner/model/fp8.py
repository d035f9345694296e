"""Matrix products of the decoder in 8-bit floats, scaled as they come, through torchao (CUDA, Hopper and newer).

- Each token has a scale of its own ("rowwise"): with one for a whole row, faster, documents would round each other.
- Weights, adapters and optimizer state are held as ever; only the products are taken in 8 bits.
- Layers are compiled besides (the config asks for it): otherwise casting costs more than the products save, and frozen
  weights would have gradients made that nobody takes.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.errors import ConfigError, ModelError, Problem
from finetuner.runtime.log import say

STEP = 16
"""Sizes of the hardware's products are multiples of it."""
WHERE, REMEDY = "model.fp8", "model.fp8=False"


def check_fp8(model: CausalLM, device: torch.device, row: int | None) -> None:
    """Refuses 8-bit products where they cannot be; rows of training are `row` tokens long, if known.

    Raises:
        ConfigError: E-FP8-DEVICE, E-FP8-ROW, E-EXTRA.
    """
    if not model.fp8:
        return
    found = f"device {device.type}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if device.type != "cuda" or major < 9:
        what, fits = "this device has no products in 8-bit floats", "CUDA with compute capability 9.0 or more"
        raise ConfigError(Problem("E-FP8-DEVICE", what, WHERE, found, fits, REMEDY))
    if row is not None and row % STEP:
        what, fits = "rows do not divide into the hardware's steps", f"a multiple of {STEP} tokens"
        remedy = f"a data.length that {STEP} divides, or {REMEDY}"
        raise ConfigError(Problem("E-FP8-ROW", what, "data.length x batch.per_device", str(row), fits, remedy))
    if find_spec("torchao") is None:
        remedy = f"pip install 'finetuner[fp8]', or {REMEDY}"
        raise ConfigError(Problem("E-EXTRA", "torchao is not installed", WHERE, "True", "False", remedy))


def use_fp8(causal: PreTrainedModel) -> None:
    """Lets the decoder's linear layers multiply in 8 bits; those of other sizes, and the head, stay.

    Raises:
        ModelError: E-FP8-NONE, no layer has such a size.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = sum(isinstance(module, nn.Linear) for module in causal.base_model.modules())
    served = sum(fits(module, name) for name, module in causal.base_model.named_modules())
    if served == 0:
        what = "no linear layer of the model has a size for products in 8-bit floats"
        raise ModelError(Problem("E-FP8-NONE", what, WHERE, f"{layers} layers", f"multiples of {STEP}", REMEDY))
    scaled = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(causal.base_model, module_filter_fn=fits, config=scaled)
    say(f"fp8: {served} of the decoder's {layers} linear layers multiply in 8 bits")


def fits(module: nn.Module, name: str) -> bool:
    """Whether the hardware takes a layer's sizes."""
    return type(module) is nn.Linear and module.in_features % STEP == 0 and module.out_features % STEP == 0
