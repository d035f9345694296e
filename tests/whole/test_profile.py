"""`finetuner profile` tells where time and memory go, and leaves the run alone; the run's own report tells the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import world


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    world.make(folder, until="Steps(6)", every=3, more=", schedule=Constant()")
    return folder


def test_parts_operators_and_memory_are_told(home: Path) -> None:
    done = world.finetuner("profile", "config.py", "--steps", 2, "--out", "seen", cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads((home / "seen" / "profile.json").read_text())
    seconds, memory = result["seconds_a_step"], result["memory_mib"]
    assert all(seconds[part] > 0 for part in ("batches", "forward", "backward", "update"))
    inner = seconds["attention"] + seconds["feed-forward"] + seconds["head and loss"]
    assert 0 < inner < seconds["forward"]
    assert memory["weights"] > 0
    assert memory["activations"] > 0
    assert memory["peak"] > memory["weights"]
    trained = 4 * sum(4 * (cols + rows) for rows, cols in SHAPES) * 2 / 2**20
    assert memory["gradients"] == pytest.approx(trained, abs=0.06)
    assert memory["optimizer"] == pytest.approx(2 * trained, abs=0.06)
    assert result["tokens_per_second"] > 0
    assert 0 < result["mfu"] < 1
    assert sum(one["share"] for one in result["operators"]) <= 1.001
    with gzip.open(home / "seen" / "trace.json.gz") as file:
        names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
    assert any("mm" in name for name in names)
    assert "forward" in done.stdout
    assert "optimizer" in done.stdout


SHAPES = ((32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64))
"""Rows and columns of a layer's linear parts: q, k, v, o, gate, up, down."""


def test_nothing_of_the_run_is_touched(home: Path) -> None:
    before = {path: path.read_bytes() for path in (home / "model").iterdir()}
    assert world.finetuner("profile", "config.py", "--steps", 1, cwd=home).returncode == 0
    assert not (home / "out").exists()
    assert (home / "profiles" / "config" / "profile.json").exists()
    assert before == {path: path.read_bytes() for path in (home / "model").iterdir()}


def test_no_steps_are_refused(home: Path) -> None:
    done = world.finetuner("profile", "config.py", "--steps", 0, cwd=home)
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_start_of_a_run_is_reported(home: Path) -> None:
    for until in (3, 6):
        done = world.finetuner("train", "config.py", f"until=Steps({until})", cwd=home)
        assert done.returncode == 0, done.stderr
    starts = json.loads((home / "out" / "run_report.json").read_text())["starts"]
    lines = [json.loads(line) for line in (home / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(one["from_step"], one["steps"]) for one in starts] == [(0, 3), (3, 3)]
    for one, part in zip(starts, (lines[:3], lines[3:]), strict=True):
        assert one["tokens"] == sum(line["tokens"] for line in part)
        assert one["learned_tokens"] == sum(line["learned_tokens"] for line in part)
        assert set(one["seconds_by_stage"]) == {"data", "model", "training"}
    for line in (*lines, *starts):
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 1
        assert 0 <= line["data_wait"] < 1
        assert line["memory_gib"] > 0
