"""One optimizer step once the gradient's norm is known: the same for every engine that steps torch's own optimizers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


def update(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    norm: Tensor,
    *,
    clip: float | None,
    factor: float,
    spoiled: Tensor | None,
) -> None:
    """Clips by the whole gradient's `norm`, updates with each group's rate times `factor`, clears the gradients.

    `spoiled`, where the optimizer is a fused one, is 1 on the device if no update may be made any more.
    """
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if spoiled is not None:
        optimizer.found_inf = spoiled  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
