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


class Wrapped(nn.Module):
    """A head that only its own forward knows, as adapters make it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) * 1.5


HEADS = {
    "plain": lambda: case(),
    "bias": lambda: case(bias=True),
    "wrapped": lambda: wrapped(case()),
    "wrapped, bias": lambda: wrapped(case(bias=True)),
}
WEIGHTS_N = torch.linspace(-1, 2, 23)
"""Of the places, where each has a log-probability of its own."""


def wrapped(parts):
    return (Wrapped(parts[0]), *parts[1:])


def grads_of(value, hidden, layer):
    value.backward()
    return [hidden.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("piece", [1, 7, 23, 100])
def test_pieces_come_to_the_whole(piece, kind, each, monkeypatch):
    monkeypatch.setattr(head, "rows", lambda vocabulary: piece)
    layer, hidden, targets = HEADS[kind]()
    made = (head.log_probs if each else head.loss_sum)(layer, hidden, targets, torch.float32)
    found = grads_of((made * WEIGHTS_N).sum() if each else made * 0.5, hidden, layer)
    layer, hidden, targets = HEADS[kind]()
    true = F.cross_entropy(layer(hidden), targets, reduction="none")
    right = grads_of(-(true * WEIGHTS_N).sum() if each else true.sum() * 0.5, hidden, layer)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, -true if each else true.sum(), rtol=1e-5, atol=1e-5)
    for grad, exact in zip(found, right, strict=True):
        assert (grad - exact).norm() / exact.norm() <= 1e-5


def test_log_probs_sum_to_the_loss():
    layer, hidden, targets = case()
    loss = grads_of(head.loss_sum(layer, hidden, targets, torch.float32), hidden, layer)
    layer, hidden, targets = case()
    for one, other in zip(loss, grads_of(-head.log_probs(layer, hidden, targets, torch.float32).sum(), hidden, layer)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["slopes_NV", "log_probs_N1"])
def test_a_wrong_slope_or_value_would_be_seen(name, monkeypatch):
    """The mutants: the target of a place is the one beside it, in the gradient or in the value."""
    right = getattr(head.Piece, name)
    monkeypatch.setattr(head.Piece, name, lambda piece: right(piece._replace(aims_N1=piece.aims_N1.roll(1, 0))))
    for each in (False, True):
        with pytest.raises(AssertionError):
            test_pieces_come_to_the_whole(23, "plain", each, pytest.MonkeyPatch())


def test_a_gradient_that_is_nobodys_is_not_made():
    """Frozen hidden states, or a frozen bias beside a weight that learns."""
    layer, hidden, targets = case(bias=True)
    layer.bias.requires_grad_(False)
    for score in (head.loss_sum, head.log_probs):
        layer.weight.grad = None
        score(layer, hidden.detach(), targets, torch.float32).sum().backward()
        assert layer.weight.grad.norm() > 0
        assert layer.bias.grad is None


def test_a_frozen_head_gets_no_gradient():
    layer, hidden, targets = case()
    layer.requires_grad_(False)
    for score in (head.loss_sum, head.log_probs):
        hidden.grad = None
        score(layer, hidden, targets, torch.float32).sum().backward()
        assert layer.weight.grad is None
        assert hidden.grad.norm() > 0


def test_half_precision_sums_in_float32():
    layer, hidden, targets = case()
    loss = head.loss_sum(layer, hidden, targets, torch.bfloat16)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ layer.weight.bfloat16().t()).float()
    true_N = F.cross_entropy(logits, targets, reduction="none")
    assert loss.item() == pytest.approx(true_N.sum().item(), rel=1e-6)
    torch.testing.assert_close(head.log_probs(layer, hidden, targets, torch.bfloat16), -true_N)


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
