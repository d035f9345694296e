"""A run ends before its time by a stop file or the longest runtime: saved, told, and gone on with later."""

from __future__ import annotations

import json
import signal

import pytest
import world

from finetuner.config.load import load
from finetuner.errors import ConfigError
from finetuner.train import runner
from finetuner.train.metrics import keep_lines
from finetuner.train.stop import STOP_FILE, Halt


def train(folder, monkeypatch, *overrides):
    monkeypatch.chdir(folder)
    return runner.train(load("config.py", overrides))


def test_a_stop_file_saves_ends_with_zero_and_is_taken_away(tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(5)", every=100)
    real, steps = Halt.__call__, []

    def at_the_third(self):
        steps.append(1)
        if len(steps) == 3:
            (tmp_path / "out" / STOP_FILE).touch()
        return real(self)

    monkeypatch.setattr(Halt, "__call__", at_the_third)
    assert train(tmp_path, monkeypatch) == 0
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-3"
    assert not (tmp_path / "out" / STOP_FILE).exists()
    assert train(tmp_path, monkeypatch) == 0
    assert [record[0] for record in world.losses(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_the_longest_runtime_ends_the_run_saved(tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(1000)", every=1000, more=", max_runtime=1e-6")
    assert train(tmp_path, monkeypatch) == 0
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-1"


def test_the_handlers_of_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Halt(tmp_path, None).listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_lines_past_the_checkpoint_and_a_torn_one_are_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_tensorboard_gets_the_figures(tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(2)", every=100)
    assert train(tmp_path, monkeypatch, 'log=Logs(every=Steps(1), to=("tensorboard",))') == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    told.Reload()
    assert [point.value for point in told.Scalars("loss")] == pytest.approx(
        [float.fromhex(record[1]) for record in world.losses(tmp_path / "out")], rel=1e-6
    )


def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(2)", every=100)
    with pytest.raises(ConfigError, match="E-EXTRA"):
        train(tmp_path, monkeypatch, 'log.to=("swanlab",)')
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
