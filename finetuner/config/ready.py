"""The ready configs that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

import finetuner


def folder() -> Path:
    """Where the ready configs lie: in the installed package, else at the top of the checkout."""
    package = Path(finetuner.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def ready() -> dict[str, Path]:
    """Name -> file: "qwen3_8b_qlora" -> .../configs/qwen3_8b_qlora.py; what begins with _ is a part, not a run."""
    top = folder()
    files = sorted(file for file in top.rglob("*.py") if not file.name.startswith("_"))
    return {file.relative_to(top).with_suffix("").as_posix(): file for file in files}
