"""`finetuner convert CHECKPOINT OUT`: a model or an adapter made from a checkpoint's state, without starting a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--to", choices=["hf"], default="hf", help="what loads it: transformers, or peft (hf)")
    parser.add_argument("--base", metavar="MODEL", help="the base, for parts that did not train")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the written weights (default: the checkpoint's; an adapter's are float32)",
    )


def run(args: argparse.Namespace) -> int:
    """Converts; gives the exit code."""
    from finetuner.export.convert import convert
    from finetuner.runtime.log import say

    done = convert(args.checkpoint, args.out, base=args.base, dtype=args.dtype)
    say(f"{done.kind} of {done.checkpoint}: {done.tensors} trained tensors, written in {done.dtype}")
    print(args.out)
    return 0
