"""`finetuner merge CHECKPOINT OUT`: the adapter goes into its base; the folder checks itself before it is there."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, an adapter, or a run's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base, where it is not at its old place")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the written weights (default: the base's)"
    )
    parser.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file of weights (5GB)")
    parser.add_argument(
        "--allow-quantised",
        action="store_true",
        help="merge into a base that is stored in 4 bits; the original base gives a better model",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="where the check runs")


def run(args: argparse.Namespace) -> int:
    """Merges; gives the exit code."""
    from finetuner.export.merge import merge
    from finetuner.runtime.log import say

    report = merge(args.checkpoint, args.out, base=args.base, dtype=args.dtype, max_shard=args.max_shard,
                   allow_quantised=args.allow_quantised, device=args.device)  # fmt: skip
    say(f"base: {report.base}")
    say(f"{report.changed} of {report.tensors} tensors changed, written in {report.dtype}")
    say(
        f"check: logits of the merged model differ from the adapted one's by {report.difference:.2e} of their size "
        f"(at most {report.tolerance:.0e}; the adapter itself makes {report.effect:.2e}); "
        f"same likeliest token at {report.agreement:.0%} of places"
    )
    if report.quantised_difference is not None:
        say(
            f"trained on a 4-bit base, merged into the original one: their logits differ by "
            f"{report.quantised_difference:.2e} of their size"
        )
    print(args.out)
    return 0
