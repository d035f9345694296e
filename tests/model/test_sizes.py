"""On a CPU in half precision sizes are rounded up, so that memory stays flat; results and gradients do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from torch.nn import functional

from finetuner import CausalLM, LoRA
from finetuner.data.batch import IGNORED, Batch
from finetuner.model import documents_apart, head, sizes
from finetuner.model.build import build
from finetuner.model.causal_lm import CausalLearner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.tiny_llama(tmp_path_factory.mktemp("sizes"))


def row(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """A row of documents, about half of whose places are learned."""
    torch.manual_seed(seed)
    tokens_1T = torch.randint(3, 60, (1, sum(lengths)))
    targets_1T = torch.where(torch.rand(1, sum(lengths)) < 0.5, tokens_1T, IGNORED)
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    learned = int((targets_1T != IGNORED).sum())
    return Batch(tokens_1T, targets_1T, positions_1T, lengths, tuple(range(len(lengths))), learned)


def learner_of(folder: Path, **fields: Any) -> CausalLearner:
    torch.manual_seed(0)
    return build(CausalLM(str(folder), checkpointing=False, **fields), CPU, dialogues=False).learner


def results(learner: CausalLearner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the learned places, and the gradient of the loss."""
    learner(batch).backward()
    gradient = torch.cat([p.grad.flatten() for _, p in learner.trainable() if p.grad is not None])
    learner.zero_grad()
    with torch.no_grad():
        return learner.log_probs(batch), gradient


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_rounding_up_changes_no_result(folder: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = row((70, 33, 33, 9, 1))
    learner = learner_of(folder, adapter=adapter)
    values, gradient = results(learner, batch)
    for module in (head, documents_apart):
        monkeypatch.setattr(module, "missing", lambda *given: 0)
    monkeypatch.setattr("finetuner.model.causal_lm.missing", lambda *given: 0)
    plain_values, plain_gradient = results(learner, batch)
    assert len(values) == batch.learned
    assert (values - plain_values).norm() <= 2e-2 * plain_values.norm()
    assert (gradient - plain_gradient).norm() <= 2e-2 * plain_gradient.norm()


def met(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> set[int]:
    """Numbers of tokens that linear layers and attentions are given, over rows of many lengths."""
    learner, seen = learner_of(folder, **fields), set()
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def noted_linear(x: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        seen.add(x.shape[-2])
        return linear(x, *given, **more)

    def noted_attention(q: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        seen.add(q.shape[-2])
        return attention(q, *given, **more)

    monkeypatch.setattr(functional, "linear", noted_linear)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted_attention)
    for seed, lengths in enumerate([(70, 33, 9), (5, 61), (128,), (101, 20), (64, 63)]):
        learner(row(lengths, seed)).backward()
    return seen


def test_half_precision_on_a_cpu_meets_few_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {size % sizes.UNIT for size in met(folder, monkeypatch)} == {0}


def test_the_law_notices_sizes_that_are_left_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_apart, "missing", lambda *given: 0)
    assert {size % sizes.UNIT for size in met(folder, monkeypatch)} != {0}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_other_devices_and_float32_keep_their_sizes(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    assert sizes.missing(70, torch.device(device), dtype) == 0
    assert sizes.missing(70, CPU, torch.bfloat16) == 58
