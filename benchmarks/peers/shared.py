"""What the scripts of the peers share: the task that they are given, and the report that they print."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


@dataclass
class Task:
    """One of two jobs: encode `rows` to ids and masks, or train on them."""

    job: str
    model: str
    rows: str
    out: str
    steps: int = 4
    per_device: int = 8
    accumulate: int = 4
    lr: float = 1e-3
    length: int = 2048


@dataclass
class Report:
    """What a peer tells: when each step ended, and its loss."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def step_ended(self) -> None:
        self.ends.append(time.time())

    def tell(self) -> None:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("\n" + json.dumps({"ends": self.ends, "losses": self.losses, "rss": rss, **self.extra}))


def task() -> Task:
    """The task of the command line: a file of JSON."""
    return Task(**json.loads(Path(sys.argv[1]).read_text()))


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def absent(*names: str) -> None:
    """Stands in for packages for images and sound, which a peer imports and does not use for text.

    transformers is imported first: it must not take them for installed.
    """
    import transformers.utils

    assert transformers.utils.is_torch_available()
    for name in names:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def listener(report: Report) -> Any:
    """A callback of transformers' Trainer that fills the report."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            report.step_ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                report.losses.append(float(logs["loss"]))

    return Ends()


def trainer_settings(task: Task) -> dict[str, Any]:
    """Arguments of transformers' Trainer, the same for all that build on it."""
    return {
        "output_dir": task.out, "max_steps": task.steps, "per_device_train_batch_size": task.per_device,
        "gradient_accumulation_steps": task.accumulate, "learning_rate": task.lr, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "logging_first_step": True,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
        "optim": "adamw_torch_fused", "gradient_checkpointing": False, "bf16": False, "fp16": False,
    }  # fmt: skip
