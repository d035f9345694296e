"""`finetuner profile CONFIG`: a few steps, looked at closely: where their time and memory go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from finetuner.config.load import load
from finetuner.runtime import allocator


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a ready one (finetuner list)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as model.checkpointing=False")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps that are measured (default: 3)")
    parser.add_argument("--out", metavar="DIR", help="where the trace and the tables go (default: profiles/NAME)")


def run(args: argparse.Namespace) -> int:
    """Performs the steps, prints the tables; nothing of it is saved but what was measured."""
    loaded = load(args.config, args.overrides)
    allocator.set_before_torch()
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler else writes of its own start and end
    from finetuner.train.profile import profile

    return profile(loaded, Path(args.out or Path("profiles") / loaded.name), args.steps)
