"""`finetuner train CONFIG [field=value ...]`: performs the run that a config file describes."""

from __future__ import annotations

import argparse
import math

from finetuner.cli import nodes
from finetuner.config.load import load
from finetuner.runtime import allocator


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of a ready one (finetuner list)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as optim.lr=1e-5 'until=Steps(500)'")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|FOLDER",
        help="auto (the default) goes on where the run stopped; never starts anew and keeps the old folder beside; "
        "FOLDER is a checkpoint to go on from",
    )
    parser.add_argument("--folder", metavar="DIR", help="where the run is written (default: work_dirs/NAME)")
    nodes.add(parser)
    parser.add_argument(
        "--hang-limit",
        type=seconds,
        metavar="SECONDS",
        help="how long a step may take before its processes are taken to hang (default: 600; 0: as long as it likes)",
    )


def seconds(text: str) -> float:
    """A duration; raises ArgumentTypeError where `text` is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return value


def run(args: argparse.Namespace) -> int:
    """Trains; gives the exit code. The config is read before torch is imported, so that its errors come at once."""
    loaded = load(args.config, args.overrides)
    if started := nodes.nodes_of(args):
        from finetuner.cli.launch import launch
        from finetuner.data.steps import accumulation

        accumulation(loaded.run.batch, started.world)
        return launch(started)
    allocator.set_before_torch()
    from finetuner.train.runner import train

    return train(loaded, folder=args.folder, resume=args.resume, hang_limit=args.hang_limit)
