"""The house rules of finetuner/, kept over its source: imports go down the floors, heavy packages have one owner.

- `findings(folder)` reads a tree with `ast`; it imports nothing of it, so that it can also judge the made-up trees
  that break one rule each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "finetuner"

FLOORS = {
    "cli": 7,
    "train": 6,
    "export": 6,
    "engine": 5,
    "generate": 5,
    "model": 4,
    "data": 3,
    "config": 2,
    "dialogue": 1,
    "runtime": 1,
    "errors": 0,
}
"""The root, finetuner/__init__.py, re-exports the nouns of config/ and counts as a part of it."""

OWNERS = {
    "deepspeed": {"engine/deepspeed_engine.py", "engine/zero_shards.py"},
    "peft": {"model/adapter.py", "export/merge.py"},
    "bitsandbytes": {"model/weights.py", "engine/optim.py"},
    "liger_kernel": {"model/kernels.py"},
    "torchao": {"model/fp8.py"},
    "datasets": {"data/source.py"},
}
LIGHT = ("config/", "dialogue/", "runtime/files.py", "runtime/commit.py", "runtime/lock.py", "runtime/log.py")
"""What runs on the way to `--help` and `show`, and in the processes that tokenize."""
SLOW = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "deepspeed"}
LINES = 300


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, at any depth, also by `import_module("name")`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = package[: len(package) - level + 1] if level else ()
                source = ".".join((*start, *([module] if module else [])))
                # `from finetuner import data` names a house as well as `from finetuner.data import ...`.
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in ("import_module", "__import__"):
                    yield node.lineno, target


def house_of(parts: tuple[str, ...]) -> str:
    """("finetuner", "data", "pack") -> "data"; what stands in the root counts as "config"."""
    if parts[1:] == ("__main__",):
        return "cli"
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "config"


def findings(folder: Path) -> list[str]:
    """What breaks a rule in the package at `folder`: "rule file:line what"."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        name, text = file.relative_to(folder).as_posix(), file.read_text(encoding="utf-8")
        module = ("finetuner", *file.relative_to(folder).with_suffix("").parts)
        here = house_of(module)
        if len(module) > 2 and module[1] not in FLOORS:
            found.append(f"house {name}:1 finetuner/{module[1]}/ is on no floor")
        if text.count("\n") > LINES:
            found.append(f"length {name}:{text.count(chr(10))} more than {LINES} lines")
        for line, target in imports(ast.parse(text), module[:-1]):
            top, *rest = target.split(".")
            if top == "finetuner":
                there = house_of((top, *rest))
                if FLOORS[there] > FLOORS[here]:
                    found.append(f"up {name}:{line} {here}/ imports {target}")
                elif FLOORS[there] == FLOORS[here] and there != here:
                    found.append(f"sideways {name}:{line} {here}/ imports {target}")
            if name not in OWNERS.get(top, {name}):
                found.append(f"owner {name}:{line} imports {top}")
            if top in SLOW and name.startswith(LIGHT):
                found.append(f"light {name}:{line} imports {top}")
    return found


def test_every_import_goes_down_and_every_heavy_package_has_its_owner() -> None:
    assert len(list(HOUSE.rglob("*.py"))) > 50, "the house is there to be judged"
    assert not findings(HOUSE), "\n" + "\n".join(findings(HOUSE))


def test_no_two_files_of_a_house_import_the_house_above_by_its_init() -> None:
    inits = [file for file in HOUSE.glob("*/__init__.py") if "import" in file.read_text(encoding="utf-8")]
    assert not inits, "a house's __init__.py imports nothing, or everyone below would pay for everything in it"


SOUND = {
    "__init__.py": "from finetuner.config.run import Run\n",
    "errors.py": "",
    "__main__.py": "from finetuner.cli.main import entry\n",
    "config/run.py": "from finetuner.errors import ConfigError\nfrom finetuner.dialogue import rows\n",
    "dialogue/rows.py": "import json\n",
    "data/source.py": "import datasets\nfrom finetuner.config.run import Run\n",
    "model/adapter.py": "def add():\n    import peft\n",
    "train/loop.py": "import torch\nfrom finetuner.engine.engine import Engine\nfrom . import metrics\n",
    "engine/engine.py": "import torch\n",
}

MUTANTS = [
    ("up", "data/pack.py", "from finetuner.model.build import build\n"),
    ("up", "data/pack.py", "def late():\n    from finetuner.cli import main\n"),
    ("up", "data/pack.py", "from finetuner import train\n"),
    ("up", "data/pack.py", "from ..engine import optim\n"),
    ("up", "data/pack.py", "from importlib import import_module\nimport_module('finetuner.train.loop')\n"),
    ("up", "dialogue/rows.py", "from finetuner import Run\n"),
    ("up", "dialogue/rows.py", "import finetuner.config.run\n"),
    ("up", "errors.py", "from finetuner.runtime.log import say\n"),
    ("up", "__init__.py", "from finetuner.train.runner import train\n"),
    ("sideways", "dialogue/rows.py", "from finetuner.runtime.files import rows_in\n"),
    ("sideways", "train/loop.py", "from finetuner.export.merge import merge\n"),
    ("sideways", "generate/answer.py", "from finetuner.engine.engine import Engine\n"),
    ("owner", "train/loop.py", "from peft import PeftModel\n"),
    ("owner", "model/causal_lm.py", "import bitsandbytes as bnb\n"),
    ("owner", "data/samples.py", "def read():\n    import datasets.load\n"),
    ("owner", "engine/torch_engine.py", "import deepspeed\n"),
    ("light", "config/model.py", "if False:\n    import torch\n"),
    ("light", "dialogue/encode.py", "from transformers import AutoTokenizer\n"),
    ("light", "runtime/commit.py", "import torch.distributed\n"),
    ("length", "engine/engine.py", "x = 1\n" * 301),
    ("house", "utils/text.py", "import json\n"),
]


def tree(folder: Path, files: dict[str, str]) -> Path:
    """Writes `files` below `folder`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_sound_tree_has_no_findings(tmp_path: Path) -> None:
    assert findings(tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "file", "text"), MUTANTS)
def test_a_tree_that_breaks_a_rule_is_found_out(tmp_path: Path, rule: str, file: str, text: str) -> None:
    found = findings(tree(tmp_path, SOUND | {file: text}))
    assert [finding.split(":")[0] for finding in found] == [f"{rule} {file}"], found
