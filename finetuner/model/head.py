"""The model's head and its loss, on learned places only and a piece at a time: whole logits never exist.

- The weight is read in one call of the head's module, whatever the number of pieces: an engine that shards weights by
  hooks around a module's call (ZeRO-3, FSDP) gathers it once a row. So the loss is a form of the head's own forward:
  see `bind`.
- A plain head's gradients are made along with the value: its backward pass reads the weight only for `log_probs` of a
  head that trains itself.
- Any other head (with an adapter, trained rows) goes through its own forward, piece by piece, and again in the backward
  pass.

Shapes: N learned places, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetuner.model.sizes import missing

BYTES = 1 << 29
"""Of one piece's logits in float32. Pieces much smaller than this make slow matrix products on a GPU."""


def loss_sum(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over N of the cross entropy, a float32 scalar. `dtype` is what the head's product is computed in."""
    assert len(targets_N) > 0
    bind(head)
    loss: Tensor = head(hidden_ND, targets_N=targets_N, dtype=dtype, each=False)
    return loss


def log_probs(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-probability of each target, N of float32; their sum is `-loss_sum`."""
    assert len(targets_N) > 0
    bind(head)
    values_N: Tensor = head(hidden_ND, targets_N=targets_N, dtype=dtype, each=True)
    return values_N


def whole_loss_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """As `loss_sum`, from logits."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def whole_log_probs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """As `log_probs`, from logits."""
    return -F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def bind(head: nn.Module) -> None:
    """Lets `head(hidden_ND, targets_N=..., dtype=..., each=...)` give the loss; `head(hidden)` gives logits as before.

    No weight and no name changes: a folder that is saved, an adapter that is merged, know nothing of it.
    """
    if not isinstance(head.__dict__.get("forward"), Forward):
        head.forward = Forward(head, head.forward, type(head) is nn.Linear)


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A head's forward that gives logits, or what targets come to."""

    head: nn.Module
    logits: Callable[..., Tensor]
    """The forward that it had."""
    plain: bool
    """A product with a weight, and a bias if there is one: decided before an engine makes the head its own."""

    def __call__(
        self,
        hidden: Tensor,
        *others: Any,
        targets_N: Tensor | None = None,
        dtype: torch.dtype | None = None,
        each: bool = False,
        **options: Any,
    ) -> Tensor:
        if targets_N is None:
            return self.logits(hidden, *others, **options)
        if not self.plain:
            return self.by_pieces(hidden, targets_N, each=each)
        weight_VD, bias_V = self.head.weight, self.head.bias
        function = LogProbs if each else CrossEntropy
        result: Tensor = function.apply(  # type: ignore[no-untyped-call]
            hidden, weight_VD, bias_V, targets_N, dtype, torch.is_grad_enabled()
        )
        return result

    def by_pieces(self, hidden_ND: Tensor, targets_N: Tensor, *, each: bool) -> Tensor:
        """Through the head's own forward."""
        size = rows(head_size(self.head))
        parts = [
            checkpoint(self.of_piece, piece_ND, aim_N, each, use_reentrant=False)
            for piece_ND, aim_N in zip(torch.split(hidden_ND, size), torch.split(targets_N, size))
        ]
        return torch.cat(parts) if each else torch.stack(parts).sum()

    def of_piece(self, hidden_ND: Tensor, targets_N: Tensor, each: bool) -> Tensor:
        return (whole_log_probs if each else whole_loss_sum)(self.logits(hidden_ND), targets_N)


def head_size(head: nn.Module) -> int:
    """V, of a head that may be wrapped."""
    return max(parameter.shape[0] for parameter in head.parameters() if parameter.ndim == 2)


def rows(vocabulary: int) -> int:
    """Places in a piece."""
    return max(1, min(4096, BYTES // (4 * vocabulary)))


class Piece(NamedTuple):
    """Some of the places, while their logits exist. M: their number, rounded up (`sizes.py`)."""

    places: slice
    hidden_MD: Tensor
    aims_N1: Tensor
    logits_NV: Tensor
    """float32"""
    total_N1: Tensor
    """logsumexp of the logits"""

    def log_probs_N1(self) -> Tensor:
        return self.logits_NV.gather(1, self.aims_N1) - self.total_N1

    def slopes_NV(self) -> Tensor:
        """d -log p(target) / d logits = softmax(logits) - onehot(target), in the place of the logits."""
        probabilities_NV = self.logits_NV.sub_(self.total_N1).exp_()
        return probabilities_NV.scatter_add_(1, self.aims_N1, torch.full_like(self.total_N1, -1.0))

    def filled(self, slopes_NV: Tensor) -> Tensor:
        """With zeros for what the number was rounded up by: M rows."""
        return F.pad(slopes_NV, (0, 0, 0, len(self.hidden_MD) - len(slopes_NV)))


def pieces_of(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Iterator[Piece]:
    """The places, piece by piece; computed in the weight's dtype."""
    size = rows(len(weight_VD))
    for start in range(0, len(targets_N), size):
        places = slice(start, start + size)
        piece_ND = hidden_ND[places].to(weight_VD.dtype)
        piece_MD = F.pad(piece_ND, (0, 0, 0, missing(len(piece_ND), piece_ND.device, piece_ND.dtype)))
        logits_NV = F.linear(piece_MD, weight_VD, bias_V)[: len(piece_ND)].float()
        yield Piece(places, piece_MD, targets_N[places, None], logits_NV, logits_NV.logsumexp(-1, keepdim=True))


class CrossEntropy(torch.autograd.Function):
    """The sum, whose gradients are made along with the value: so no logits wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight, wants_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            own_VD, own_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
            grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
            grads = Sums(weight_VD, bias_V, wants_weight, wants_bias)
            for piece in pieces_of(hidden_ND, own_VD, own_V, targets_N):
                loss -= piece.log_probs_N1().sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                slopes_MV = piece.filled(piece.slopes_NV().to(dtype))
                if grad_ND is not None:
                    grad_ND[piece.places] = (slopes_MV @ own_VD)[: len(piece.aims_N1)]
                grads.add(slopes_MV, piece.hidden_MD)
        ctx.save_for_backward(grad_ND, *grads.like(weight_VD, bias_V))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        made = [None if own is None else own * grad.to(own.dtype) for own in ctx.saved_tensors]
        return *made, None, None, None


class LogProbs(torch.autograd.Function):
    """The log-probabilities, whose gradients to the hidden states are made along with the values.

    Those to a weight that trains hang on what each place's gradient will be: its logits are made again for them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:  # fmt: skip
        wants_hidden, *wants_head = (learns and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            own_VD, own_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            values_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
            grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
            for piece in pieces_of(hidden_ND, own_VD, own_V, targets_N):
                values_N[piece.places] = piece.log_probs_N1()[:, 0]
                if grad_ND is not None:
                    slopes_MV = piece.filled(piece.slopes_NV().to(dtype))
                    grad_ND[piece.places] = (slopes_MV @ own_VD)[: len(piece.aims_N1)].neg_()
        again = (hidden_ND, weight_VD, bias_V, targets_N) if any(wants_head) else ()
        ctx.save_for_backward(grad_ND, *again)
        ctx.dtype = dtype
        return values_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        own_ND, *again = ctx.saved_tensors
        to_hidden_ND = None if own_ND is None else own_ND * grad_N[:, None].to(own_ND.dtype)
        if not again:
            return to_hidden_ND, None, None, None, None, None
        hidden_ND, weight_VD, bias_V, targets_N = again
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        sums = Sums(weight_VD, bias_V, wants_weight, wants_bias)
        with torch.autocast(grad_N.device.type, enabled=False):
            own_VD, own_V = weight_VD.to(ctx.dtype), None if bias_V is None else bias_V.to(ctx.dtype)
            for piece in pieces_of(hidden_ND, own_VD, own_V, targets_N):
                slopes_NV = piece.slopes_NV().mul_(-grad_N[piece.places, None]).to(ctx.dtype)
                sums.add(piece.filled(slopes_NV), piece.hidden_MD)
        return to_hidden_ND, *sums.like(weight_VD, bias_V), None, None, None


class Sums:
    """Gradients to a head's weight and bias, summed over pieces in float32."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, wants_weight: bool, wants_bias: bool) -> None:
        self.weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        self.bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None

    def add(self, slopes_MV: Tensor, hidden_MD: Tensor) -> None:
        if self.weight_VD is not None:
            self.weight_VD += slopes_MV.t() @ hidden_MD
        if self.bias_V is not None:
            self.bias_V += slopes_MV.float().sum(0)

    def like(self, weight_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """In the dtypes of weight and bias."""
        pairs = ((self.weight_VD, weight_VD), (self.bias_V, bias_V))
        weight, bias = (None if own is None or other is None else own.to(other.dtype) for own, other in pairs)
        return weight, bias
