"""AdamW over named parameters: which of them decay, and at which rate each part learns.

- Norms, biases and embeddings do not decay: decided by the kind of the parameter, not by its name.
- The optimizer is made of named parameters, so that its state is kept and restored by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim import Optimizer

from finetuner.config.run import AdamW
from finetuner.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a rate and a decay."""

    rate: float
    decay: float
    named: tuple[tuple[str, nn.Parameter], ...]


def groups(model: nn.Module, trainable: Iterable[tuple[str, nn.Parameter]], optim: AdamW) -> list[Group]:
    """The trainable parameters, each in exactly one group, in the order of their names' first appearance.

    Raises:
        ConfigError: a pattern of `optim.rates` that matches no trainable parameter.
    """
    named = list(trainable)
    for pattern in optim.rates:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            some = ", ".join(name for name, _ in named[:4])
            raise ConfigError(
                Problem(
                    "E-OPTIM-RATES",
                    f"no trained parameter is named like {pattern!r}",
                    "optim.rates",
                    pattern,
                    f"patterns of names such as {some}",
                    "mend the pattern or remove it",
                )
            )
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    parted: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        rate = next((rate for pattern, rate in optim.rates.items() if fnmatchcase(name, pattern)), optim.lr)
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        parted.setdefault((rate, optim.weight_decay if decays else 0.0), []).append((name, parameter))
    return [Group(rate, decay, tuple(members)) for (rate, decay), members in parted.items()]


def build_optimizer(parted: list[Group], optim: AdamW, device: torch.device) -> Optimizer:
    """An AdamW whose groups carry their full rate as "rate"; the loop multiplies it with the schedule's factor.

    Raises:
        ConfigError: 8-bit moments without CUDA.
    """
    if optim.bits == 8:
        return eight_bit(parted, optim, device)
    return torch.optim.AdamW(
        [
            {"params": list(group.named), "lr": group.rate, "rate": group.rate, "weight_decay": group.decay}
            for group in parted
        ],
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def eight_bit(parted: list[Group], optim: AdamW, device: torch.device) -> Optimizer:
    """bitsandbytes' AdamW with 8-bit moments, its groups named as torch names them.

    Raises:
        ConfigError: without CUDA, or without bitsandbytes.
    """
    if device.type != "cuda":
        found = f"device {device}"
        raise ConfigError(
            Problem("E-OPTIM-8BIT", "8-bit moments need CUDA", "optim.bits", found, "32", "optim.bits=32")
        )
    try:
        import bitsandbytes
    except ImportError:
        remedy = "pip install 'finetuner[quant]', or optim.bits=32"
        raise ConfigError(
            Problem("E-EXTRA", "bitsandbytes is not installed", "optim.bits", "8", remedy=remedy)
        ) from None
    made: Optimizer = bitsandbytes.optim.AdamW8bit(
        [
            {"params": [p for _, p in group.named], "lr": group.rate, "rate": group.rate, "weight_decay": group.decay}
            for group in parted
        ],
        betas=optim.betas,
        eps=optim.eps,
    )
    for group, plain in zip(made.param_groups, parted, strict=True):
        group["param_names"] = [name for name, _ in plain.named]
    return made
