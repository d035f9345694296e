"""The head's loss against plain cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetuner.model import head


def case(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    layer = nn.Linear(16, 50, bias=bias)
    hidden = torch.randn(23, 16, dtype=dtype).requires_grad_()
    return layer, hidden, torch.randint(0, 50, (23,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 23, 100])
def test_pieces_sum_to_the_whole(piece, bias, monkeypatch):
    monkeypatch.setattr(head, "rows", lambda vocabulary: piece)
    layer, hidden, targets = case(bias=bias)
    loss = head.loss_sum(layer, hidden, targets, torch.float32)
    (loss * 0.5).backward()
    found = [hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    layer, hidden, targets = case(bias=bias)
    true = F.cross_entropy(layer(hidden), targets, reduction="sum")
    (true * 0.5).backward()
    assert loss.item() == pytest.approx(true.item(), rel=1e-6)
    for grad, right in zip(found, [hidden.grad, *(parameter.grad for parameter in layer.parameters())]):
        assert (grad - right).norm() / right.norm() <= 1e-5


def test_a_frozen_head_gets_no_gradient():
    layer, hidden, targets = case()
    layer.requires_grad_(False)
    head.loss_sum(layer, hidden, targets, torch.float32).backward()
    assert layer.weight.grad is None
    assert hidden.grad.norm() > 0


def test_half_precision_sums_in_float32():
    layer, hidden, targets = case()
    loss = head.loss_sum(layer, hidden, targets, torch.bfloat16)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ layer.weight.bfloat16().t()).float()
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-6)


def test_evaluation_equals_training():
    layer, hidden, targets = case()
    with torch.no_grad():
        quiet = head.loss_sum(layer, hidden, targets, torch.float32)
    assert torch.equal(quiet, head.loss_sum(layer, hidden, targets, torch.float32))


def test_a_target_one_to_the_right_is_another_loss():
    """The mutant of the shift: the check above is not blind to it."""
    layer, hidden, targets = case()
    right = head.loss_sum(layer, hidden, targets, torch.float32)
    assert head.loss_sum(layer, hidden, targets.roll(1), torch.float32).item() != pytest.approx(right.item(), rel=1e-3)
