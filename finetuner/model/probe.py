"""What each decoder layer keeps of a row for the backward pass: tried with three short rows, not guessed.

a short row through the learner -> each layer's arguments -> the layer alone, plain and checkpointed, under torch's
saved-tensor hooks -> bytes -> the same for a row of full length (`room.grown`)

- On the real device, in the learner's own precision, with its attention, its adapter and its tiles.
- Weights, buffers and what all layers share (rotary tables, masks) do not count; a storage saved twice counts once.
- The generators stand afterwards where they stood before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from finetuner.data.batch import IGNORED, Batch
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.room import Kept, grown

DOCUMENT = 64
"""Tokens of a probe's documents."""
UNIT = 2 * DOCUMENT
"""Tokens of the shortest row: two documents, so that they are kept apart by the attention that training takes."""


def probe(learner: CausalLearner, layers: Sequence[nn.Module], tokens: int) -> list[Kept]:
    """What each of `layers` keeps of a row of `tokens` tokens. The layers' checkpointing function is set already."""
    cuda = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        rows = [measured(learner, layers, units * UNIT) for units in (1, 2, 3)]
    times = tokens / UNIT
    return [
        Kept(grown(*(plain for plain, _ in sizes), times=times), grown(*(input_ for _, input_ in sizes), times=times))
        for sizes in zip(*rows)
    ]


def measured(learner: CausalLearner, layers: Sequence[nn.Module], tokens: int) -> list[tuple[int, int]]:
    """Bytes that each layer keeps of a short row: plain, checkpointed."""
    known = [*learner.parameters(), *learner.buffers()]
    kept = []
    for calls in arguments(learner, layers, tokens):
        kept.append((taken(learner, calls, known, checkpointed=False), taken(learner, calls, known, checkpointed=True)))
    return kept


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def arguments(learner: CausalLearner, layers: Sequence[nn.Module], tokens: int) -> list[list[Call]]:
    """The calls of each layer in one forward pass over a row of `tokens`."""
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer].append((layer, args, kwargs))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        # Checkpointed, so that a row fits here that would only just fit later.
        with torch.enable_grad(), switched(layers, checkpointed=True):
            learner(row(tokens, learner.causal.get_input_embeddings().weight.shape[0]))
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def row(tokens: int, vocabulary: int) -> Batch:
    """A row of that many tokens with one learned place."""
    count = tokens // DOCUMENT
    tokens_1T = (torch.arange(tokens) % vocabulary)[None]
    targets_1T = torch.full_like(tokens_1T, IGNORED)
    targets_1T[0, 0] = 0
    positions_1T = torch.arange(DOCUMENT).repeat(count)[None]
    return Batch(tokens_1T, targets_1T, positions_1T, (DOCUMENT,) * count, tuple(range(count)), 1)


def taken(learner: CausalLearner, calls: Sequence[Call], known: Sequence[Tensor], *, checkpointed: bool) -> int:
    """Bytes that these calls of a layer keep."""
    total = 0
    for layer, args, kwargs in calls:
        inputs = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
        shared = [tensor for value in kwargs.values() for tensor in tensors(value)]
        with learner.autocast(), switched([layer], checkpointed=checkpointed), saved([*known, *shared]) as storages:
            layer(*inputs, **kwargs)
        total += sum(storage.nbytes() for storage in storages.values())
    return total


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


@contextmanager
def switched(layers: Iterable[nn.Module], *, checkpointed: bool) -> Iterator[None]:
    """All of `layers` checkpointed, or none, in the block; then each as it was."""
    before = [(layer, layer.gradient_checkpointing) for layer in layers]
    try:
        for layer, _ in before:
            layer.gradient_checkpointing = checkpointed  # type: ignore[assignment]
        yield
    finally:
        for layer, flag in before:
            layer.gradient_checkpointing = flag


@contextmanager
def saved(known: Iterable[Tensor]) -> Iterator[dict[int, UntypedStorage]]:
    """The storages that are saved for a backward pass in the block, by their address, those of `known` left out."""
    storages: dict[int, UntypedStorage] = {}
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
