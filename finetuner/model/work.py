"""`Work`: the arithmetic that training a model takes, for what share of a device's speed it uses.

Floating-point operations, two of each multiplication with its addition:

- a matrix of P weights costs 2 P a token forward, 2 P for the gradient of its input, 2 P for its own where it trains;
  the head is needed at learned places only; of an expert layer the chosen share counts;
- attention of a document of L tokens costs 4 H L^2 / 2 a layer forward (H: width of all heads), 2.5 times that
  backward, as flash attention computes it (Dao 2023, arXiv:2307.08691, section 4.1); a window of W keys bounds L.

What checkpointing computes again is not counted: it is a price, not work done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finetuner.model.shards import shape_of

FORWARD_AND_BACKWARD = 3.5


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of a model's training."""

    per_token: int
    per_learned: int
    layers: tuple[tuple[int, int | None], ...]
    """Of each attention layer: the width of all heads, and its window."""

    def of(self, lengths: npt.NDArray[np.int64], learned: int) -> float:
        """Operations of a step whose documents have these lengths, `learned` of whose places are learned."""
        total = float(self.per_token * int(lengths.sum()) + self.per_learned * learned)
        for width, window in self.layers:
            total += FORWARD_AND_BACKWARD * 4 * width * pairs(lengths, window)
        return total


def pairs(lengths: npt.NDArray[np.int64], window: int | None) -> float:
    """Half the squares of the lengths: pairs of a token and one that it sees."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((lengths * seen - seen * seen / 2).sum())


def work_of(model: nn.Module, causal: PreTrainedModel) -> Work:
    """The work of `model`, which is `causal`, perhaps with adapters in it."""
    config = causal.config.get_text_config()
    head = causal.get_output_embeddings()
    heads = {id(module) for module in head.modules()} if head is not None else set()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    per_token = per_learned = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            in_head = id(module) in heads
            shape = shape_of(parameter)
            if len(shape) < 2 or (id(parameter) in embeddings and not in_head) or isinstance(module, nn.Embedding):
                continue
            size = shape.numel()
            if isinstance(module, nn.Linear) and name == "weight":  # 4-bit weights do not show their size
                size = module.in_features * module.out_features
            if len(shape) == 3:
                size = int(size * chosen_share(config))
            cost = (6 if parameter.requires_grad else 4) * size
            per_learned, per_token = per_learned + cost * in_head, per_token + cost * (not in_head)
    return Work(per_token, per_learned, attention_layers(config))


def chosen_share(config: PreTrainedConfig) -> float:
    """Experts that a token goes to, of all."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    return float((getattr(config, "num_experts_per_tok", None) or experts) / experts)


def attention_layers(config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...]:
    """(width, window) of each layer."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    everywhere = window is not None and not getattr(config, "layer_types", None)
    width = size * config.num_attention_heads
    return tuple((width, window if everywhere or kind == "sliding_attention" else None) for kind in kinds)
