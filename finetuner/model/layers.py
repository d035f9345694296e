"""The decoder layers of a model that can each be told to recompute, found by their kind and not by a name."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in their order; none where the model's layers know of no checkpointing of their own."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return [layer for stack in stacks for layer in stack if isinstance(layer, GradientCheckpointingLayer)]
