"""What a run's folder tells of it: the config as given and as resolved, versions, data; and what changed since.

Nothing of it is ever executed: config.json is data, config.py.txt is for the eye.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from finetuner import __version__
from finetuner.config.load import Loaded
from finetuner.config.mask import mask_source, mask_text
from finetuner.config.write import differences, to_json
from finetuner.errors import CheckpointError, Problem
from finetuner.runtime.log import say

FREE = (
    "log",
    "ask",
    "save",
    "eval",
    "max_runtime",
    "folder",
    "batch.per_device",
    "engine",
    "model.checkpointing",
    "model.offload",
    "model.tiled_mlp",
    "model.attention",
    "model.compile",
    "model.kernels",
    "model.fp8",
    "model.path",
    "model.revision",
    "data.source",
    "data.rows",
    "data.replace",
    "data.on_bad_row",
    "data.too_long",
    "data.turns",
    "data.system",
    "optim",
    "schedule",
    "until",
)
"""What may change when a run goes on: it is told. That base and samples are still the same is checked by themselves,
wherever they lie now and however they are read."""


def run_id(folder: Path) -> str | None:
    """The id of the run that lives in `folder`, if one does."""
    return str(recorded(folder, "run.json", "id")["id"]) if holds_run(folder) else None


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`."""
    return (folder / "run.json").exists()


def recorded(folder: Path, name: str, *needed: str) -> dict[str, Any]:
    """What a file of the run's record holds.

    Raises:
        CheckpointError: E-RUN-RECORD, it is not there, or not as it was written.
    """
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        found = "" if isinstance(values, dict) else f"a {type(values).__name__}"
        found = found or ", ".join(f"no {key!r}" for key in needed if key not in values)
    except (OSError, ValueError) as error:
        found = str(error)
    if found:
        what, remedy = "the record of the run is damaged", "--resume never starts anew and keeps this folder beside"
        where = str(folder / name)
        raise CheckpointError(Problem("E-RUN-RECORD", what, where, found, "the file as it was written", remedy))
    return dict(values)


def begin(folder: Path, loaded: Loaded, data: str, base: str | None, *, world: int) -> None:
    """Writes the record of a run that begins or goes on in `folder`."""
    identity = run_id(folder) or secrets.token_hex(8)
    file = folder / "run.json"
    starts = recorded(folder, "run.json", "starts")["starts"] if file.exists() else []
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world": world, "command": mask_text(" ".join(sys.argv))}
    shaped = {"data": data, "base": base, "versions": versions(), "seed": loaded.run.seed}
    record = {"id": identity, **shaped, "starts": [*starts, start]}
    replace(folder / "config.py.txt", mask_source(loaded.source))
    replace(folder / "config.json", json.dumps(to_json(loaded.run), indent=2, ensure_ascii=False) + "\n")
    replace(file, json.dumps(record, indent=2) + "\n")


def end(folder: Path, report: Mapping[str, Any]) -> None:
    """Adds what came of this start to the run's report."""
    file = folder / "run_report.json"
    starts = recorded(folder, file.name, "starts")["starts"] if file.exists() else []
    replace(file, json.dumps({"starts": [*starts, report]}, indent=2) + "\n")


def check_same(folder: Path, loaded: Loaded, data: str, base: str | None) -> None:
    """Tells key by key what changed since the run in `folder` was last started.

    Raises:
        CheckpointError: a change under which the checkpoint or the data's order no longer fits.
    """
    told = changes(folder, loaded)
    for change in told:
        say(f"changed since the last start: {change}")
    hard = [change for change in told if not change.startswith(FREE)]
    remedy = "put them back, or start anew: --resume never (the old folder is kept beside)"
    if hard:
        raise CheckpointError(
            Problem(
                "E-RESUME-CONFIG",
                "the config no longer fits the run that it would go on with",
                str(folder),
                "; ".join(hard),
                f"changes of {', '.join(FREE)}",
                remedy,
            )
        )
    began = recorded(folder, "run.json", "data", "base")
    if began["base"] != base:
        what, found = "the base's weights are not those that the run began with", "other values, by their print"
        raise CheckpointError(Problem("E-RESUME-BASE", what, str(folder), found, remedy=remedy))
    if began["data"] != data:
        raise CheckpointError(
            Problem(
                "E-RESUME-DATA",
                "the data, or how it is read, changed since the run began",
                str(folder),
                "other samples than it began with",
                remedy=remedy,
            )
        )


def changes(folder: Path, loaded: Loaded) -> list[str]:
    """What in the config differs from the last start in `folder`, key by key."""
    return differences(recorded(folder, "config.json"), to_json(loaded.run))


def versions() -> Mapping[str, Any]:
    """Versions of what shapes a run's numbers."""
    known = {}
    for name in ("torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes", "numpy"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    return {"finetuner": __version__, "python": platform.python_version()} | known


def replace(file: Path, text: str) -> None:
    """Writes `text` so that the file is the old one or the new one, never half."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
