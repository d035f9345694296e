"""Parts of a model that stay as they are, by patterns of their parameters' names."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn

from finetuner.errors import ModelError, Problem, nearest


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Lets the parameters whose names fit one of `patterns` stay as they are.

    Raises: ModelError where a pattern fits none.
    """
    names = [name for name, _ in model.named_parameters()]
    problems = []
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            best = nearest(pattern, names)
            remedy = f"did you mean {best!r}?" if best else f"names look like {names[0]!r}"
            problems.append(
                Problem("E-FREEZE-PATTERN", "freeze matches no parameter", "model.freeze", pattern, remedy=remedy)
            )
    if problems:
        raise ModelError(*problems)
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
