"""A model that trains, or was loaded, ready to generate for a while; afterwards it is as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from finetuner.model import attention


@contextmanager
def answering(model: nn.Module, causal: PreTrainedModel, compute: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode and an attention that takes a cache; then each module's mode and the attention again.

    `model` is transformers' `causal`, or peft's around it; `compute` is what training computes in, None goes by the
    weights. No gradient, but not `inference_mode`: what a module keeps of a call (rope tables) must serve training too.
    """
    modes = [(module, module.training) for module in model.modules()]
    attends, cached = causal.config._attn_implementation, causal.config.get_text_config().use_cache
    model.eval()
    if attends == attention.NAME:
        causal.set_attn_implementation(attention.transformers_own(causal))
    try:
        with torch.no_grad(), computing_in(model, compute):
            yield
    finally:
        if attends == attention.NAME:
            causal.set_attn_implementation(attends)
        causal.config.get_text_config().use_cache = cached
        for module, mode in modes:
            module.training = mode


def computing_in(model: nn.Module, compute: torch.dtype | None) -> torch.autocast:
    """Autocast to `compute`; without it where float32 adapters lie beside narrower weights, as in training."""
    device = next(model.parameters()).device.type
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    narrow = compute or min(dtypes, key=lambda dtype: dtype.itemsize)
    mixed = dtypes != {narrow}
    return torch.autocast(device, narrow if mixed else None, enabled=mixed)
