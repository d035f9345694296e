"""A resumed run equals the unbroken one bit for bit; a finished run started again does nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import world

from finetuner.config.load import load
from finetuner.errors import CheckpointError
from finetuner.train import runner


def train(folder, *overrides, **options):
    """Trains what lies in `folder`, from there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return runner.train(load("config.py", overrides), **options)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run with dropout, packing and a checkpoint kept at every step."""
    folder = tmp_path_factory.mktemp("unbroken")
    world.make(folder, every=1)
    assert train(folder, "save.keep=100") == 0
    return folder


def halt_at(monkeypatch, step):
    """Lets the run hear a SIGTERM in `step`, as a signal does."""
    from finetuner.train import stop

    heard = {"steps": 0}

    def answer(self):
        heard["steps"] += 1
        if heard["steps"] == step:
            self.exit_code = 143
            return True
        return False

    monkeypatch.setattr(stop.Halt, "__call__", answer)


def steps_of(folder):
    return [record[0] for record in world.losses(folder / "out")]


def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(unbroken, tmp_path, monkeypatch):
    wanted, total = world.losses(unbroken / "out"), len(steps_of(unbroken))
    assert total >= 6, "too short to prove anything"
    for stop in range(1, total):
        folder = tmp_path / f"stop-{stop}"
        shutil.copytree(unbroken, folder, symlinks=True, ignore=shutil.ignore_patterns("out"))
        with monkeypatch.context() as patch:
            halt_at(patch, stop)
            assert train(folder) == 143
        assert steps_of(folder) == list(range(1, stop + 1))
        assert train(folder) == 0
        assert world.losses(folder / "out") == wanted, f"stopped at {stop}"
        assert world.weights(folder / "out") == world.weights(unbroken / "out"), f"stopped at {stop}"


def test_the_law_notices_a_lost_optimizer_state(unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "mutant"
    shutil.copytree(unbroken, folder, symlinks=True, ignore=shutil.ignore_patterns("out"))
    with monkeypatch.context() as patch:
        halt_at(patch, 3)
        train(folder)
    from finetuner.engine.torch_engine import TorchEngine

    real = TorchEngine.load

    def forgets(self, state):
        real(self, state)
        self.optimizer.state.clear()

    monkeypatch.setattr(TorchEngine, "load", forgets)
    train(folder)
    assert world.losses(folder / "out") != world.losses(unbroken / "out")


def test_the_law_notices_dropout_that_depends_on_the_past(unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "mutant"
    shutil.copytree(unbroken, folder, symlinks=True, ignore=shutil.ignore_patterns("out"))
    from finetuner.train import loop

    monkeypatch.setattr(loop, "seed_all", lambda *numbers: None)
    with monkeypatch.context() as patch:
        halt_at(patch, 3)
        train(folder)
    train(folder)
    assert world.losses(folder / "out") != world.losses(unbroken / "out")


def test_a_finished_run_does_nothing(unbroken, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(unbroken, folder, symlinks=True)
    before = world.weights(folder / "out"), world.losses(folder / "out")
    assert train(folder, "save.keep=100") == 0
    assert (world.weights(folder / "out"), world.losses(folder / "out")) == before


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(unbroken, tmp_path, capsys):
    folder = tmp_path / "torn"
    shutil.copytree(unbroken, folder, symlinks=True)
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    file = newest / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(folder, "save.keep=100") == 0
    assert newest.name in capsys.readouterr().err
    assert world.losses(folder / "out") == world.losses(unbroken / "out")
    assert world.weights(folder / "out") == world.weights(unbroken / "out")


def test_all_checkpoints_torn_is_an_error_and_never_a_quiet_new_start(unbroken, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(unbroken, folder, symlinks=True)
    for checkpoint in (folder / "out").glob("checkpoint-*"):
        (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-NONE"):
        train(folder)


def test_a_changed_config_is_told_key_by_key(unbroken, tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(unbroken, folder, symlinks=True)
    with pytest.raises(CheckpointError, match=r"E-RESUME-CONFIG(.|\n)*batch.total"):
        train(folder, "batch.total=8", "until=Epochs(3)")
    assert "optim.lr" not in capsys.readouterr().err


def test_changed_data_is_not_gone_on_with(unbroken, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(unbroken, folder, symlinks=True)
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("Ada", "Eve", 1))
    with pytest.raises(CheckpointError, match="E-RESUME-DATA"):
        train(folder, "until=Epochs(3)")


def test_resume_never_keeps_the_old_run_beside(unbroken, tmp_path):
    folder = tmp_path / "never"
    shutil.copytree(unbroken, folder, symlinks=True)
    assert train(folder, resume="never") == 0
    assert (folder / "out.1" / "run.json").exists()
    assert world.losses(folder / "out") == world.losses(unbroken / "out")
    first, second = (json.loads((folder / name / "run.json").read_text())["id"] for name in ("out", "out.1"))
    assert first != second


def test_what_moved_and_is_the_same_is_gone_on_with(unbroken, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(unbroken, folder, symlinks=True)
    os.rename(folder / "model", folder / "base")
    os.rename(folder / "rows.jsonl", folder / "dialogues.jsonl")
    moved = ("model.path=base", "data.source.files=dialogues.jsonl", "save.keep=100", "until=Epochs(3)")
    assert train(folder, *moved) == 0
    assert 'model.path: "model" -> "base"' in capsys.readouterr().err
    assert len(steps_of(folder)) > len(steps_of(unbroken))


def test_another_base_of_the_same_shape_is_not_gone_on_with(unbroken, tmp_path):
    import rig

    folder = tmp_path / "base"
    shutil.copytree(unbroken, folder, symlinks=True)
    rig.tiny_llama(folder / "model", seed=7, attention_dropout=0.1)
    with pytest.raises(CheckpointError, match="E-RESUME-BASE"):
        train(folder, "until=Epochs(3)")


def test_another_part_held_out_is_not_gone_on_with(unbroken, tmp_path):
    folder = tmp_path / "held"
    shutil.copytree(unbroken, folder, symlinks=True)
    with pytest.raises(CheckpointError, match="E-RESUME-DATA"):
        train(folder, "eval=Eval(fraction=0.3)", "until=Epochs(3)")
