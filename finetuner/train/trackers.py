"""Where figures go besides metrics.jsonl: TensorBoard, and the trackers of the `trackers` extra."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, assert_never

from finetuner.config.run import Run
from finetuner.errors import ConfigError, Problem

Name = Literal["tensorboard", "wandb", "swanlab", "trackio"]


def check(run: Run) -> None:
    """Finds a tracker that is not installed.

    Raises:
        ConfigError: E-EXTRA.
    """
    for name in run.log.to:
        _module(name, "board" if name == "tensorboard" else "trackers")


def start(run: Run, folder: Path, config: Mapping[str, Any]) -> tuple[Callable[[int, Mapping[str, float]], None], ...]:
    """A function for each tracker of `run.log.to`: (step, figures) -> None.

    Raises:
        ConfigError: a tracker that is not installed.
    """
    return tuple(_start(name, run.log.project, folder, config) for name in run.log.to)


def _start(
    name: Name, project: str, folder: Path, config: Mapping[str, Any]
) -> Callable[[int, Mapping[str, float]], None]:
    match name:
        case "tensorboard":
            _module("tensorboard", "board")
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def board(step: int, figures: Mapping[str, float]) -> None:
                for key, value in figures.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return board
        case "wandb" | "trackio" | "swanlab":
            tracker = _module(name, "trackers")
            places = {
                "wandb": {"name": folder.name, "dir": str(folder)},
                "swanlab": {"experiment_name": folder.name, "logdir": str(folder / "swanlog")},
                "trackio": {"name": folder.name},
            }
            tracker.init(project=project, config=dict(config), **places[name])
            return lambda step, figures: tracker.log(dict(figures), step=step)
        case _:
            assert_never(name)


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            Problem(
                "E-EXTRA",
                f"{name} is not installed",
                "log.to",
                name,
                remedy=f"pip install 'finetuner[{extra}]', or remove it from log.to",
            )
        ) from None
