"""The model's head and its loss, on learned places only and a piece at a time: whole logits never exist.

Shapes: N learned places, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BYTES = 1 << 29
"""Of one piece's logits in float32. Pieces much smaller than this make slow matrix products on a GPU."""


def loss_sum(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over N of the cross entropy, a float32 scalar. `dtype` is what the head's product is computed in."""
    assert len(targets_N) > 0
    if type(head) is nn.Linear and head.bias is None:
        learns = torch.is_grad_enabled()
        return PiecewiseCrossEntropy.apply(hidden_ND, head.weight, targets_N, dtype, learns)
    pieces = zip(torch.split(hidden_ND, rows(head_size(head))), torch.split(targets_N, rows(head_size(head))))
    losses = [checkpoint(piece_loss, head, h_ND, y_N, use_reentrant=False) for h_ND, y_N in pieces]
    return torch.stack(losses).sum()


def piece_loss(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """As `loss_sum`, through any head (with an adapter, a bias, trained rows)."""
    return whole_loss_sum(head(hidden_ND), targets_N)


def whole_loss_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """As `loss_sum`, from logits."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def head_size(head: nn.Module) -> int:
    """V, of a head that may be wrapped."""
    return max(parameter.shape[0] for parameter in head.parameters() if parameter.ndim == 2)


def rows(vocabulary: int) -> int:
    """Places in a piece."""
    return max(1, min(4096, BYTES // (4 * vocabulary)))


class PiecewiseCrossEntropy(torch.autograd.Function):
    """Cross entropy of hidden @ weight.T, whose gradients are made along with the value, piece by piece.

    With p = softmax(z): d loss / d z = p - onehot(target); so no logits wait for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, learns: bool
    ) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return gather(ctx, hidden_ND, weight_VD, targets_N, dtype, learns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        return hidden * grad.to(hidden.dtype), None if weight is None else weight * grad, None, None, None


def gather(
    ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, learns: bool
) -> Tensor:
    """The loss; keeps its gradients in `ctx`."""
    wants_hidden, wants_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
    computed_VD = weight_VD.to(dtype)
    size = rows(len(weight_VD))
    grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, len(targets_N), size):
        piece_ND, aim_N1 = hidden_ND[start : start + size].to(dtype), targets_N[start : start + size, None]
        logits_NV = (piece_ND @ computed_VD.t()).float()
        total_N1 = logits_NV.logsumexp(-1, keepdim=True)
        loss += (total_N1 - logits_NV.gather(1, aim_N1)).sum()
        if not (wants_hidden or wants_weight):
            continue
        grad_NV = logits_NV.sub_(total_N1).exp_().scatter_add_(1, aim_N1, torch.full_like(total_N1, -1.0)).to(dtype)
        if grad_ND is not None:
            grad_ND[start : start + size] = grad_NV @ computed_VD
        if grad_VD is not None:
            grad_VD += grad_NV.t() @ piece_ND
    ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
    return loss
