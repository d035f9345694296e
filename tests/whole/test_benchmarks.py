"""The benchmarks run; what they ask of the small sizes on one thread holds, by processor time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import world


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=world.ROOT / "benchmarks", env=env, capture_output=True, text=True)


@pytest.mark.parametrize("section", ["exact", "step", "head", "start"])
def test_ours_is_ahead_at_small_sizes(section: str) -> None:
    done = ran("cpu.py", "--quick", "--check", "--rounds", "1" if section == "step" else "3", "--only", section)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_notices_what_is_missed() -> None:
    code = "import sys, cpu; row = cpu.Row('x', (1.0, 1.2), least=1.5); print(row); sys.exit(not row.holds)"
    done = ran("-c", code)
    assert done.returncode == 1
    assert "MISSED" in done.stdout


def test_the_gpu_benchmark_runs_at_toy_size() -> None:
    done = ran("gpu.py", "--toy", "--only", "roof", "attention", "head", "no checkpointing", "3B full, all layers")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("product", "packed attention", "8B LoRA, no checkpointing", "8B QLoRA, no", "1B full, no", "3B full"):
        assert name in done.stdout
    errors = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if " error " in line]
    assert errors
    assert max(errors) < 0.02


def test_the_scale_benchmark_runs_at_small_size() -> None:
    done = ran("scale.py", "--only", "rows", "--rows", "5", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume at 90 %" in done.stdout
