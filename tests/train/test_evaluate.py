"""Validation: a mean over tokens, whatever the cut, and without effect on the training that follows."""

from __future__ import annotations

import pytest
import world

from finetuner.config.load import load
from finetuner.train import runner
from finetuner.train.milestones import Standing


def train(folder, monkeypatch, *overrides):
    monkeypatch.chdir(folder)
    assert runner.train(load("config.py", overrides)) == 0
    return world.losses(folder / "out")


def evaluations(folder):
    import json

    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


@pytest.mark.parametrize("every", [1, 3])
def test_evaluating_and_asking_change_nothing_of_the_training(tmp_path, monkeypatch, every):
    held = ', eval=Eval(data=Dialogues(Json("rows.jsonl"), length=96), every=Steps({}))'.format
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    world.make(plain, until="Steps(6)", every=100)
    world.make(
        busy, until="Steps(6)", every=100, more=held(every) + ', ask=Ask(["who?"], every=Steps(1), max_tokens=4)'
    )
    assert train(plain, monkeypatch) == train(busy, monkeypatch)
    assert world.weights(plain / "out").keys() == world.weights(busy / "out").keys()
    assert len(evaluations(busy)) >= 2


def test_the_validation_loss_does_not_depend_on_packing(tmp_path, monkeypatch):
    losses = []
    for pack in (True, False):
        folder = tmp_path / str(pack)
        held = f', eval=Eval(data=Dialogues(Json("rows.jsonl"), length=96, pack={pack}), every=Steps(100))'
        world.make(folder, until="Steps(1)", every=100, more=held)
        train(folder, monkeypatch)
        losses += evaluations(folder)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_best_is_the_lowest_finite_loss():
    standing = Standing()
    for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0), (4, 1.5), (5, float("inf"))):
        standing = standing.after(step, loss)
    assert (standing.best_step, standing.best_loss, standing.waited) == (3, 1.0, 2)


def test_a_run_without_progress_ends_early_and_keeps_its_best(tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(30)", every=1, more=", eval=Eval(fraction=0.2, patience=2)")
    from finetuner.train import runner as module

    values = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(module, "validation_loss", lambda learner, batches: next(values))
    losses = train(tmp_path, monkeypatch, "save.keep=1")
    assert len(losses) == 4
    assert (tmp_path / "out" / "best").resolve().name == "checkpoint-2"
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-4"
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert train(tmp_path, monkeypatch, "save.keep=1") == losses
