"""Fused kernels for norms, rotary positions and gated layers, through liger-kernel (CUDA).

The loss stays ours: it is taken on learned places only.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from finetuner.config.model import CausalLM, Fresh
from finetuner.errors import ConfigError, ModelError, Problem
from finetuner.model import internlm2
from finetuner.model.folder import model_folder, read_config
from finetuner.runtime.log import say

WHERE, REMEDY = "model.kernels", 'model.kernels="torch"'


def check_kernels(model: CausalLM, device: torch.device) -> None:
    """Refuses kernels that are not there for this device or this family, before a weight is read.

    Raises:
        ConfigError: E-KERNELS-DEVICE, E-EXTRA.
        ModelError: E-KERNELS-FAMILY.
    """
    if model.kernels == "torch":
        return
    if device.type != "cuda":
        found, fits = f"device {device.type}", '"torch"'
        raise ConfigError(Problem("E-KERNELS-DEVICE", "Liger's kernels need CUDA", WHERE, found, fits, REMEDY))
    if find_spec("liger_kernel") is None:
        remedy = f"pip install 'finetuner[liger]', or {REMEDY}"
        raise ConfigError(Problem("E-EXTRA", "liger-kernel is not installed", WHERE, model.kernels, '"torch"', remedy))
    check_family(family(model))


def check_family(name: str) -> None:
    """Refuses a family that Liger has no kernels for: it would leave the model as it is, and say so nowhere."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        what = "Liger has no kernels for this family of models"
        raise ModelError(Problem("E-KERNELS-FAMILY", what, WHERE, name, known, REMEDY))


def family(model: CausalLM) -> str:
    """The `model_type` as which transformers reads the model: "llama" for InternLM2."""
    if isinstance(model.path, Fresh):
        return str(model.path.config["model_type"])
    values: dict[str, Any] = read_config(model_folder(model))
    return "llama" if internlm2.is_model(values) else str(values["model_type"])


def use_kernels(causal: PreTrainedModel) -> None:
    """Puts Liger's kernels into `causal`, whose family has some."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=causal, cross_entropy=False, fused_linear_cross_entropy=False)
    say("kernels: Liger's for norms, rotary positions and gated layers")
