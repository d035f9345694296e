"""`finetuner train CONFIG [field=value ...]`: performs the run that a config file describes."""

from __future__ import annotations

import argparse

from finetuner.config.load import load
from finetuner.runtime import allocator
from finetuner.runtime.ranks import world


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
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine, one a GPU")


def run(args: argparse.Namespace) -> int:
    """Trains; gives the exit code. The config is read before torch is imported, so that its errors come at once."""
    loaded = load(args.config, args.overrides)
    if args.nproc != 1 and world() == 1:
        from finetuner.cli.launch import launch
        from finetuner.data.steps import accumulation

        accumulation(loaded.run.batch, max(1, args.nproc))
        return launch(args.nproc)
    allocator.set_before_torch()
    from finetuner.train.runner import train

    return train(loaded, folder=args.folder, resume=args.resume)
