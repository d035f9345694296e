"""AdamW over named parameters: which of them decay, and at which rate each part learns.

- Norms, biases and embeddings do not decay: decided by the kind of the parameter, not by its name.
- LoRA+ and rates of parts are groups of one optimizer: they cost nothing.
- The optimizer is made of named parameters, so that its state is kept and restored by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim import Optimizer

from finetuner.config.run import AdamW
from finetuner.errors import ConfigError, Problem
from finetuner.model.shards import shape_of


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
        decays = len(shape_of(parameter)) >= 2 and id(parameter) not in embeddings
        parted.setdefault((rate_of(name, optim), optim.weight_decay if decays else 0.0), []).append((name, parameter))
    return [Group(rate, decay, tuple(members)) for (rate, decay), members in parted.items()]


def rate_of(name: str, optim: AdamW) -> float:
    """At which rate the parameter learns: that of the first pattern; LoRA+'s for a B matrix; else the run's.

    In an adapter W + s B A, B starts at 0 and wants the greater rate (Hayou et al. 2024, arXiv:2402.12354).
    """
    named = (rate for pattern, rate in optim.rates.items() if fnmatchcase(name, pattern))
    greater = optim.lora_plus if optim.lora_plus is not None and ".lora_B." in name else 1.0
    return next(named, optim.lr * greater)


def check_optimizer(optim: AdamW, device: torch.device) -> None:
    """Refuses moments that `device` cannot hold as asked.

    Raises:
        ConfigError: E-OPTIM-8BIT or E-OPTIM-PAGED without CUDA, E-EXTRA without bitsandbytes.
    """
    if not asks_for_bitsandbytes(optim):
        return
    if device.type != "cuda":
        code, what, field, fits = ("E-OPTIM-8BIT", "8-bit moments need CUDA", "optim.bits", "32")
        if optim.bits != 8:
            code, what, field, fits = (
                "E-OPTIM-PAGED",
                "moments are paged between a GPU and its host",
                "optim.paged",
                "False",
            )
        raise ConfigError(Problem(code, what, field, f"device {device}", fits, f"{field}={fits}"))
    if find_spec("bitsandbytes") is None:
        found, remedy = f"bits={optim.bits}, paged={optim.paged}", "pip install 'finetuner[quant]', or leave them out"
        raise ConfigError(Problem("E-EXTRA", "bitsandbytes is not installed", "optim", found, remedy=remedy))


def asks_for_bitsandbytes(optim: AdamW) -> bool:
    """Whether torch's own AdamW does not do."""
    return optim.bits == 8 or optim.paged


def build_optimizer(parted: list[Group], optim: AdamW, device: torch.device) -> Optimizer:
    """An AdamW whose groups carry their full rate as "rate"; the loop multiplies it with the schedule's factor.

    Raises:
        ConfigError: see `check_optimizer`.
    """
    check_optimizer(optim, device)
    if asks_for_bitsandbytes(optim):
        return by_bitsandbytes(parted, optim)
    return torch.optim.AdamW(
        [
            {"params": list(group.named), "lr": group.rate, "rate": group.rate, "weight_decay": group.decay}
            for group in parted
        ],
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def by_bitsandbytes(parted: list[Group], optim: AdamW) -> Optimizer:
    """bitsandbytes' AdamW, its moments in 8 bits or paged or both, its groups named as torch names them."""
    import bitsandbytes.optim as kinds

    kind = {
        (8, False): kinds.AdamW8bit,
        (8, True): kinds.PagedAdamW8bit,
        (32, True): kinds.PagedAdamW32bit,
    }[optim.bits, optim.paged]
    made: Optimizer = kind(
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
