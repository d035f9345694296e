"""A run imports what it needs and nothing else, and what its device cannot do is told before anything is read."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import world

UNNEEDED = {
    "bitsandbytes", "datasets", "flash_attn", "liger_kernel", "mmengine", "pandas", "peft", "pyarrow",
    "swanlab", "tensorboard", "torchao", "torchvision", "trackio", "trl", "wandb", "scipy", "sklearn",
}  # fmt: skip
"""Packages that full training on a local file needs none of."""
PROBE = """
import json, os, sys, traceback

class Watch:
    who = {}
    def find_spec(self, name, path, target=None):
        frames = [f.filename for f in traceback.extract_stack() if "importlib" not in f.filename]
        self.who.setdefault(name, frames[-2])

sys.meta_path.insert(0, Watch())
from finetuner.cli.main import main

code = main(sys.argv[1:])
tops = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "tops": tops, "modules": sorted(sys.modules), "who": Watch.who}))
"""


def imports(folder: Path, model: str) -> dict[str, object]:
    """What a run of one step has imported at its end, and from which file each module was asked for first."""
    config = world.make(folder, model=model, until="Steps(1)", count=8)
    env = world.environment(XDG_CACHE_HOME=str(folder / "cache"))
    command = [sys.executable, "-c", PROBE, "train", config.name]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    return found


def test_full_training_imports_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    found = imports(tmp_path, "")
    assert {"torch", "transformers", "safetensors"} <= set(found["tops"]), "it has trained"
    assert not UNNEEDED & set(found["tops"])
    # accelerate imports DeepSpeed, where it is installed, when transformers saves a model.
    assert "/finetuner/" not in found["who"].get("deepspeed", "")
    assert "transformers.trainer" not in found["modules"]


def test_an_adapter_brings_peft_and_what_peft_brings_itself(tmp_path: Path) -> None:
    found = imports(tmp_path, world.LORA)
    assert "peft" in found["tops"], "the probe sees an import"
    assert not (UNNEEDED - {"peft", "bitsandbytes"}) & set(found["tops"])
    for package in ("bitsandbytes", "accelerate"):  # peft and transformers ask for them wherever they are installed
        assert "/finetuner/" not in found["who"].get(package, ""), found["who"].get(package)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("model.compile=True",), "E-COMPILE-DEVICE"),
        (("model.kernels=liger",), "E-KERNELS-DEVICE"),
        (("model.fp8=True", "model.compile=True", "model.dtype=bfloat16"), "E-COMPILE-DEVICE"),
        (("optim.paged=True",), "E-OPTIM-PAGED"),
        (("optim.bits=8",), "E-OPTIM-8BIT"),
    ],
)
def test_what_a_cpu_cannot_do_is_told_before_data_and_model(words: tuple[str, ...], code: str, tmp_path: Path) -> None:
    config = world.make(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    done = world.finetuner("train", config.name, "engine.device=cpu", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"error[{code}]" in done.stderr
    assert done.stderr.count("error[") == 1
    assert not (tmp_path / "out").exists()


def test_how_memory_is_held_is_told_in_the_runs_log(tmp_path: Path) -> None:
    config = world.make(tmp_path, until="Steps(1)", count=8)
    env = world.environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    env = {name: value for name, value in env.items() if not name.startswith(("MALLOC_", "GLIBC", "LD_PRELOAD"))}
    done = world.finetuner("train", config.name, "engine.device=cpu", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    if platform.libc_ver()[0] == "glibc":
        told = (tmp_path / "out" / "logs" / "rank-0.log").read_text()
        assert told.count("memory that is freed") == 1
