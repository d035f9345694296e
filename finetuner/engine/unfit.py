"""What is told of a state that cannot be written or does not fit: names, shapes, files, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetuner.errors import CheckpointError, Problem, nearest


def check_names(where: Path, what: str, saved: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuses other names than those `wanted`.

    Raises:
        CheckpointError: E-STATE-NAMES.
    """
    have, want = set(saved), set(wanted)
    missing, unexpected = sorted(want - have), sorted(have - want)
    if missing or unexpected:
        parts = [f"missing {some(missing)}"] * bool(missing) + [f"unexpected {some(unexpected)}"] * bool(unexpected)
        close = nearest(missing[0], unexpected) if missing else ""
        hint = f" ({close} may be {missing[0]})" if close else ""
        raise problem(
            "E-STATE-NAMES",
            f"the {what} in the checkpoint are not this model's",
            where,
            "; ".join(parts) + hint,
            f"exactly the {len(want)} names of this model",
            "resume with the config that the checkpoint was made with",
        )


def check_shape(where: Path, name: str, found: Sequence[int], *fits: Sequence[int]) -> None:
    """Refuses a shape that is none of `fits`.

    Raises:
        CheckpointError: E-STATE-SHAPE.
    """
    if list(found) not in [list(shape) for shape in fits]:
        raise problem(
            "E-STATE-SHAPE",
            f"{name} has another shape in the checkpoint",
            where,
            str(list(found)),
            " or ".join(dict.fromkeys(str(list(shape)) for shape in fits)),
            "resume with the config that the checkpoint was made with",
        )


def check_sound(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors with nothing in them, and numbers that are not finite.

    Raises:
        CheckpointError: E-STATE-EMPTY, E-STATE-NONFINITE.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise problem(
                "E-STATE-EMPTY",
                f"{name} is empty",
                where,
                f"shape {list(tensor.shape)}",
                "the whole tensor, or the part that this rank holds",
                "gather sharded weights before they are saved",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise problem(
                "E-STATE-NONFINITE",
                f"{name} has NaN or infinity in it",
                where,
                f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers",
                "finite numbers",
                "go on from an older checkpoint, with a smaller learning rate",
            )


def unreadable(path: Path, error: Exception | str) -> CheckpointError:
    """E-STATE-FILE."""
    what, fits = "a file of the state cannot be read", "the file that was written"
    return problem("E-STATE-FILE", what, path, str(error), fits, "resume from another checkpoint")


def some(names: list[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def problem(code: str, what: str, where: Path, found: str, fits: str, remedy: str) -> CheckpointError:
    """A `CheckpointError` of one problem."""
    return CheckpointError(Problem(code, what, where=str(where), found=found, fits=fits, remedy=remedy))
