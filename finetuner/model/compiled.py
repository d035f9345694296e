"""Decoder layers through torch.compile, a kernel or two for what would be a dozen: rows of one length, nothing else.

- A compiled layer is made for one length, so that a row is filled up behind its documents with some that teach nothing:
  documents do not see each other, so loss and gradients stay what they were.
- The attention is left out. It goes by the lengths of a row's documents, which are others in each row, and torch would
  compile anew for each of them. They pass through the layer as one value, into which only the attention looks.
- Where a layer's activations are made again in the backward pass, its parts are compiled instead of the whole: torch
  does not compile what runs inside its checkpoint, except what asks for it itself.
- Answers and validation, whose rows have any length, run the same layers uncompiled.

T: tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from transformers import AttentionInterface, PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.data.batch import IGNORED, Batch
from finetuner.errors import ConfigError, ModelError, Problem
from finetuner.model import attention
from finetuner.model.layers import decoder_layers
from finetuner.runtime.log import say


def check_compile(model: CausalLM, device: torch.device) -> None:
    """Refuses compilation where it cannot be, or is not worth its time.

    Raises:
        ConfigError: E-COMPILE-DEVICE, E-COMPILE-MISSING.
    """
    if not model.compile:
        return
    where, remedy = "model.compile", "model.compile=False"
    if device.type != "cuda":
        what = "layers are compiled for CUDA only; on a CPU it is a few percent for minutes of compiling"
        raise ConfigError(Problem("E-COMPILE-DEVICE", what, where, f"device {device.type}", "False", remedy))
    if find_spec("triton") is None:
        what = "torch compiles for CUDA through triton, which is not installed"
        raise ConfigError(
            Problem("E-COMPILE-MISSING", what, where, "True", "False", f"pip install triton, or {remedy}")
        )


def compile_layers(causal: PreTrainedModel, attends: str, row: int, backend: str = "inductor") -> None:
    """Lets the decoder layers be compiled when they first see a row; `row` is the T of all of them.

    Raises:
        ModelError: E-COMPILE-UNFIT, the model has no layers of transformers' common kind.
    """
    layers = decoder_layers(causal)
    if not layers:
        what, found = "the model has no decoder layers that could be compiled each by itself", type(causal).__name__
        raise ModelError(Problem("E-COMPILE-UNFIT", what, "model.compile", found, "False", "model.compile=False"))
    if attends == attention.NAME:
        left_out = torch.compiler.disable(attention.documents_apart)  # type: ignore[no-untyped-call]
        AttentionInterface.register(attention.NAME, left_out)
    for layer in layers:
        for part in layer.children() if layer.gradient_checkpointing else (layer,):
            part.compile(dynamic=False, backend=backend)
    say(f"{len(layers)} layers are compiled at the first step, which takes longer for it; rows are {row} tokens long")


def fill_row(batch: Batch, size: int) -> Batch:
    """`batch` with documents behind it that teach nothing, `size` tokens in all: (3, 2) to 9 -> (3, 2, 3, 1).

    None is longer than the batch's longest, so that no position is new to the model and no kernel grows.
    """
    missing, longest = size - batch.tokens_1T.shape[1], max(batch.lengths)
    assert missing >= 0, "rows are no longer than the length that the layers are compiled for"
    if missing == 0:
        return batch
    places_1T = torch.arange(missing, dtype=batch.positions_1T.dtype, device=batch.positions_1T.device)[None] % longest
    rest = (missing % longest,) if missing % longest else ()
    return replace(
        batch,
        tokens_1T=torch.cat([batch.tokens_1T, batch.tokens_1T.new_zeros(1, missing)], 1),
        targets_1T=torch.cat([batch.targets_1T, batch.targets_1T.new_full((1, missing), IGNORED)], 1),
        positions_1T=torch.cat([batch.positions_1T, places_1T], 1),
        lengths=(*batch.lengths, *[longest] * (missing // longest), *rest),
    )
