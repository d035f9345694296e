"""The verbs that look: `show` a resolved config, `list` and `copy` the ready ones, `env` for what is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import platform
from argparse import ArgumentParser, Namespace
from pathlib import Path

import finetuner
from finetuner.cli.copying import copy_ready
from finetuner.config.load import load
from finetuner.config.mask import mask
from finetuner.config.node import spot
from finetuner.config.ready import ready
from finetuner.config.run import Run, ZeRO
from finetuner.config.write import to_json, to_source
from finetuner.engine.zero import deepspeed_config
from finetuner.errors import Problem, UsageError, nearest

CONFIG_HELP = "a config file (.py; it is executed: it is your program), or the name of a ready config"
OVERRIDES_HELP = "a field of the config to set, such as optim.lr=1e-5, model.quant=None or 'until=Steps(500)'"
PACKAGES = {
    "torch": "",
    "transformers": "",
    "tokenizers": "",
    "peft": "",
    "datasets": "",
    "safetensors": "",
    "pydantic": "",
    "mmengine-lite": "",
    "bitsandbytes": "quant",
    "deepspeed": "deepspeed",
    "flash-attn": "flash",
    "liger-kernel": "liger",
    "torchao": "fp8",
    "pillow": "vision",
    "tensorboard": "board",
    "wandb": "trackers",
    "swanlab": "trackers",
    "trackio": "trackers",
}
"""Package -> the extra of finetuner that brings it; "" comes with finetuner itself."""


def add_show(parser: ArgumentParser) -> None:
    """Declares what `finetuner show` takes."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("overrides", metavar="field=value", nargs="*", help=OVERRIDES_HELP)
    parser.add_argument("--json", action="store_true", help="every field, as JSON")


def show(args: Namespace) -> int:
    """Prints the resolved config: what differs from the defaults as Python, or everything as JSON."""
    loaded = load(args.config, args.overrides)
    if args.json:
        print(json.dumps(to_json(loaded.run), indent=2, ensure_ascii=False))
    else:
        print(to_source(loaded.run, about=f"{loaded.name}, resolved."), end="")
        for line in for_deepspeed(loaded.run):
            print(line)
    return 0


def for_deepspeed(run: Run) -> list[str]:
    """The config that DeepSpeed is given, as comments; nothing for another engine."""
    if not isinstance(run.engine, ZeRO):
        return []
    text = json.dumps(mask(deepspeed_config(run)), indent=2)
    return ["", "# What DeepSpeed is given:", *(f"# {line}" for line in text.splitlines())]


def add_list(parser: ArgumentParser) -> None:
    """Declares what `finetuner list` takes."""
    parser.add_argument("word", metavar="WORD", nargs="?", default="", help="only those whose name or line has it")


def list_ready(args: Namespace) -> int:
    """Prints the ready configs, a name and a line each."""
    lines = {name: first_line(file) for name, file in ready().items()}
    wanted = {name: line for name, line in lines.items() if args.word.lower() in f"{name} {line}".lower()}
    if not wanted:
        best = nearest(args.word, lines)
        what = f"no ready config has {args.word!r} in its name or its first line"
        remedy = f"did you mean {best}?" if best else "see `finetuner list` for all of them"
        raise UsageError(Problem("E-LIST-NONE", what, found=args.word, remedy=remedy))
    width = max(map(len, wanted)) + 2
    for name, line in wanted.items():
        print(f"{name:<{width}}{line}".rstrip())
    return 0


def first_line(file: Path) -> str:
    """The first line of a config's docstring; the file is not executed."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def add_copy(parser: ArgumentParser) -> None:
    """Declares what `finetuner copy` takes."""
    parser.add_argument("name", metavar="NAME", help="a ready config, as `finetuner list` names it")
    parser.add_argument("dest", metavar="DEST", nargs="?", default=".", help="a folder, or NAME.py (default: here)")


def copy(args: Namespace) -> int:
    """Copies a ready config, and the files that it imports; nothing is ever overwritten."""
    for file in copy_ready(args.name, Path(args.dest)):
        print(spot(os.path.abspath(file)))
    return 0


def add_env(parser: ArgumentParser) -> None:
    """Declares what `finetuner env` takes: nothing."""


def env(args: Namespace) -> int:
    """Prints versions, devices, and the extras that bring what is missing."""
    print(f"{'finetuner':<16}{finetuner.__version__}")
    print(f"{'python':<16}{platform.python_version()} on {platform.platform()}")
    for package, extra in PACKAGES.items():
        print(f"{package:<16}{version(package) or missing(extra)}")
    if version("torch"):
        print(f"{'devices':<16}{devices()}")
    return 0


def version(package: str) -> str:
    """The installed version, or the empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def missing(extra: str) -> str:
    """How to get a package that is not there."""
    return f"not installed; pip install 'finetuner[{extra}]'" if extra else "MISSING; pip install finetuner"


def devices() -> str:
    """The devices that torch sees; the one place here that imports it."""
    import torch

    cpu = f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    if not torch.cuda.is_available():
        return f"{cpu}; no CUDA device"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = [f"cuda:{n} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for n, gpu in enumerate(gpus)]
    return "; ".join([*names, cpu])
