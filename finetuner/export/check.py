"""Whether two models say the same: their logits on a few texts, as one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from finetuner.model.answering import computing_in

TEXTS = ("Hello, who are you?", "The sum of 17 and 25 is", "春眠不觉晓，处处闻啼鸟。")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference that rounding explains, by the dtype that the weights are stored in."""


def probes(tokenizer: PreTrainedTokenizerFast, new_ids: Sequence[int]) -> list[list[int]]:
    """Token ids of the texts; new tokens stand behind the last."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    return [*ids[:-1], [*ids[-1], *new_ids[:16]]]


@torch.no_grad()
def logits_of(model: nn.Module, probes: Sequence[Sequence[int]]) -> Tensor:
    """The float32 logits of all probes, one after the other: (places, vocabulary)."""
    device = next(model.parameters()).device
    with computing_in(model, None):
        rows = [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in probes]
    return torch.cat(rows)


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|; the padding rows of a grown vocabulary have no meaning and are left out."""
    width = min(one.shape[1], other.shape[1])
    return float((one[:, :width] - other[:, :width]).norm() / other[:, :width].norm())


def agreement(one: Tensor, other: Tensor) -> float:
    """The share of places at which both find the same token likeliest."""
    return float((one.argmax(1) == other.argmax(1)).float().mean())
