"""`Watch`: knows the first step whose loss or gradient was not finite, without the host waiting for the device.

- `spoiled` becomes 1 on the device in that step and stays 1; a fused optimizer that is given it as `found_inf` skips
  that update and all after it. So the weights stay those before the step, however late the host learns of it.
- The host reads the verdict of a step `LAG` steps later, when it is long there: the device never idles meanwhile, and
  every rank learns of it at the same step.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from finetuner.engine.engine import NonFinite

LAG = 1
"""Steps that a GPU's host is ahead of the verdicts that it reads."""


class Watch:
    """Looks at each step's loss and norm. `lag`: verdicts that may be unread; 0 reads each at once."""

    def __init__(self, device: torch.device, lag: int) -> None:
        self.spoiled = torch.zeros((), device=device)
        self._first = torch.zeros(3, dtype=torch.float64, device=device)
        self._lag = lag
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Takes in a step's loss and its gradient's norm, which are the same on all ranks.

        Raises:
            NonFinite: the verdict that is now due.
        """
        figures = torch.stack([loss.new_full((), step), loss, norm.to(loss)])
        sound = torch.isfinite(figures).all()
        self._first = torch.where(sound | (self.spoiled > 0), self._first, figures)
        self.spoiled.copy_(torch.maximum(self.spoiled, (~sound).float()))
        self._unread.append(carried(torch.cat([self.spoiled.to(loss)[None], self._first])))
        self.read(self._lag)

    def read(self, lag: int = 0) -> None:
        """Reads verdicts until `lag` are left.

        Raises:
            NonFinite: a step was not finite.
        """
        while len(self._unread) > lag:
            verdict, arrives = self._unread.popleft()
            if arrives is not None:
                arrives.synchronize()
            spoiled, step, loss, norm = verdict.tolist()
            if spoiled:
                raise NonFinite(int(step), loss, norm)


def carried(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`figures` on their way to the host, and the event of their arrival."""
    if figures.device.type != "cuda":
        return figures.cpu(), None
    there = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    there.copy_(figures, non_blocking=True)
    arrives = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrives.record()
    return there, arrives
