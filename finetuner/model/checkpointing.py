"""Activation checkpointing as a dial: how many of a model's layers recompute their activations in the backward pass.

    "auto":  probe of each layer, free memory, what is still to come -> the smallest number of layers with which a row
    fits, the same on every rank -> told in one line

- No choice changes a loss or a gradient by a bit: a layer recomputes from the same input and the same generator.
- Without reentrance: frozen embeddings need not require gradients for the adapters behind them to get theirs.

Checkpointing: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finetuner.config.model import CausalLM, Checkpointing
from finetuner.errors import ConfigError, ModelError, Problem
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.head import head_size, rows
from finetuner.model.layers import decoder_layers
from finetuner.model.offload import CudaLane, Host, offloaded
from finetuner.model.probe import probe
from finetuner.model.room import SHARE, Kept, fewest, free_bytes, held
from finetuner.runtime import dist
from finetuner.runtime.log import say, warn


def set_checkpointing(learner: CausalLearner, source: CausalLM, tokens: int | None) -> None:
    """Lets as many layers recompute as `source` asks for; `tokens` are those of a row, None where no row is known.

    Raises: ModelError.
    """
    layers = decoder_layers(learner.causal)
    check_layers(learner.causal, source)
    if not layers:
        all_or_none(learner.causal, source.checkpointing)
        return
    recompute = partial(checkpoint, use_reentrant=False)
    if source.offload:
        recompute = partial(offloaded, Host(CudaLane(learner.device)))
    for layer in layers:
        layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]
    match source.checkpointing:
        case "auto":
            count = len(layers) if tokens is None else automatic(learner, layers, tokens)
        case bool(every):
            count = len(layers) if every else 0
        case int(count):
            pass
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count  # type: ignore[assignment]


def check_offload(source: CausalLM, device: torch.device) -> None:
    """Refuses offloading where the device's memory is the host's own.

    Raises: ConfigError.
    """
    if source.offload and device.type != "cuda":
        what, found = "there is no other memory to offload to", f"device {device}"
        raise ConfigError(Problem("E-OFFLOAD", what, "model.offload", found, "a GPU", "model.offload=False"))


def check_layers(model: PreTrainedModel, source: CausalLM) -> None:
    """Refuses what asks for single layers of a model that cannot switch them, and more layers than there are.

    Raises: ModelError.
    """
    count, asked = len(decoder_layers(model)), source.checkpointing
    kind = type(model).__name__
    if not count and (source.offload or type(asked) is int):
        where, found = ("model.offload", "True") if source.offload else ("model.checkpointing", str(asked))
        what, remedy = f"the layers of {kind} cannot be checkpointed one by one", f"{where}={source.offload is False}"
        raise ModelError(Problem("E-CHECKPOINTING", what, where, found, "model.checkpointing=True or False", remedy))
    if type(asked) is int and asked > count:
        what, remedy = f"{kind} has {count} layers", f"model.checkpointing={count}, or True"
        raise ModelError(Problem("E-CHECKPOINTING", what, "model.checkpointing", str(asked), f"0 to {count}", remedy))


def all_or_none(model: PreTrainedModel, asked: Checkpointing) -> None:
    """Checkpointing of a model that has a switch for all its layers, or none at all.

    Raises: ModelError where it has none and `asked` wants it.
    """
    if asked is False:
        return
    kind = type(model).__name__
    if not model.supports_gradient_checkpointing:
        if asked == "auto":
            warn(f"{kind} cannot recompute activations: all are kept (model.checkpointing)")
            return
        what, remedy = f"{kind} cannot recompute activations", "model.checkpointing=False"
        raise ModelError(Problem("E-CHECKPOINTING", what, "model.checkpointing", "True", "False", remedy))
    if asked == "auto":
        say(f"checkpointing all layers: those of {kind} cannot be switched one by one")
    enable = {"use_reentrant": False}
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers 5.2x's name of it
        model.activation_checkpointing_enable(enable)
    else:
        model.gradient_checkpointing_enable(enable)


def automatic(learner: CausalLearner, layers: Sequence[nn.Module], tokens: int) -> int:
    """The smallest number of checkpointed layers with which a row of `tokens` fits on every rank; tells it."""
    free = free_bytes(learner.device)
    kept = probe(learner, layers, tokens)
    free = None if free is None else int(-dist.largest(-float(free)))
    if free is None:
        say(f"checkpointing all {len(layers)} layers: this system does not tell its free memory")
        return len(layers)
    after, head = to_come(learner), head_bytes(learner, tokens)
    room = int(SHARE * free) - after
    count = int(dist.largest(fewest(kept, room, head)))
    say(told(kept, count, free, after, head))
    if held(kept, count, head) > room:
        warn(f"a row of {tokens} tokens may not fit: less data.length or batch.per_device, or see docs/configs.md")
    return count


def told(kept: Sequence[Kept], count: int, free: int, after: int, head: int) -> str:
    """What was chosen and why."""
    line = f"checkpointing {count} of {len(kept)} layers: {size(held(kept, 0, head))} of activations a row without it"
    if count:
        line += f", {size(held(kept, count, head))} with it"
    return line + f"; {size(free)} free, {size(after)} of them for gradients and optimizer"


def size(count: int) -> str:
    """1610612736 -> "1.5 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"


def to_come(learner: CausalLearner) -> int:
    """Bytes that a step takes besides activations: a trained weight's gradient, two moments, and its cast."""
    trained = sum(parameter.numel() for _, parameter in learner.trainable())
    cast = 0 if learner.compute == torch.float32 else learner.compute.itemsize
    return trained * (4 + 2 * 4 + cast)


def head_bytes(learner: CausalLearner, tokens: int) -> int:
    """Bytes around the layers, an upper bound: embeddings, last norm, a piece of the logits or all, their gradients."""
    head = learner.causal.get_output_embeddings()
    width, vocabulary = learner.causal.get_input_embeddings().weight.shape[1], head_size(head)
    places = min(tokens, rows(vocabulary)) if learner.has_plain_head else tokens
    trains = any(parameter.requires_grad for parameter in head.parameters())
    numbers: int = 4 * tokens * width + 2 * places * vocabulary + (vocabulary * width if trains else 0)
    return 4 * numbers
