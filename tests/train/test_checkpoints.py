"""A checkpoint written in the background is, bit for bit, the one that a waiting run would have written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import time

import pytest
import rig
import torch
import world
from safetensors.torch import load_file

from finetuner import NF4, AdamW, BatchSize, CausalLM, Dialogues, Json, LoRA, Run, Saves, Steps
from finetuner.config.load import load
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.data.steps import Plan
from finetuner.engine import checkpoint, snapshot
from finetuner.engine.torch_engine import TorchEngine
from finetuner.errors import CheckpointError, Problem, TrainingStopped
from finetuner.model import causal_lm, save
from finetuner.model.build import build
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
from finetuner.runtime.commit import verify
from finetuner.train import checkpoints, loop, runner
from finetuner.train.checkpoints import Checkpoints
from finetuner.train.milestones import Milestones

KINDS = {
    "full": {},
    "tied": {"llama": {"tie_word_embeddings": True}},
    "frozen in part": {"freeze": ("*layers.0*", "*embed*")},
    "lora": {"adapter": LoRA(rank=2)},
    "dora": {"adapter": LoRA(rank=2, dora=True)},
    "qlora": {"adapter": LoRA(rank=2), "quant": NF4(), "llama": {"hidden_size": 64}},
    "head": {"adapter": LoRA(rank=2, modules_to_save=("lm_head",))},
    "new tokens": {"adapter": LoRA(rank=2), "new_tokens": ("<|call|>",)},
}


class Made:
    """A run's engine without its loop: steps are taken one by one."""

    def __init__(self, folder, *, llama=None, stored="bfloat16", **fields):
        rig.tiny_llama(folder / "model", dtype=stored, **(llama or {}))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows(8)))
        model = CausalLM(str(folder / "model"), dtype="float32", checkpointing=False, **fields)
        data = Dialogues(Json(str(folder / "rows.jsonl")), length=512)
        self.run = Run(model=model, data=data, optim=AdamW(lr=1e-2), batch=BatchSize(total=1), until=Steps(9))
        samples = prepare(data, encoder_spec(load_tokenizer(model)), cache=folder / "cache", workers=0)
        packs = pack_samples(samples, seed=0)
        self.feed = Feed(samples, Plan(packs, 1, Steps(9), 0), 0, 1, 1)
        torch.manual_seed(0)
        self.learner = build(model, torch.device("cpu"), dialogues=True).learner
        self.engine = TorchEngine(self.learner, self.run.optim, torch.device("cpu"))
        self.step = 0

    def train(self, steps=2):
        for _ in range(steps):
            learned = self.feed.learned(self.step)
            batches = self.feed.batches(self.step)
            losses = [self.engine.accumulate(batch, learned, last=True).double() for batch in batches]
            self.engine.step(self.step, 1.0, torch.stack(losses).sum() / learned)
            self.step += 1

    def checkpoints(self, folder, *, background):
        run = dataclasses.replace(self.run, save=Saves(background=background))
        return Checkpoints(run, folder, self.engine, identity="mine", base=None)


def prints(folder):
    """sha256 of each file below."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def both(made, folder, monkeypatch):
    """The prints of one moment's checkpoint, written while training waits, and while it goes on and answers."""
    made.train()
    with made.checkpoints(folder / "waiting", background=False) as waiting:
        waiting.save(2, {}, None)
    monkeypatch.setenv("FINETUNER_SLOW", "mkdir:0.5")  # before anything is read of what was taken
    with made.checkpoints(folder / "going-on", background=True) as going_on:
        going_on.save(2, {}, None)
        made.train()
        made.learner.causal.config.use_cache = not made.learner.causal.config.use_cache
        made.learner.causal.generation_config.max_new_tokens = 7
        assert not list((folder / "going-on").glob("*")), "the write was over before training went on: nothing is shown"
    return prints(folder / "waiting"), prints(folder / "going-on")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_while_training_goes_on_is_what_waiting_would_have_written(kind, tmp_path, monkeypatch):
    made = Made(tmp_path, **KINDS[kind])
    waited, went_on = both(made, tmp_path, monkeypatch)
    assert waited == went_on
    assert verify(tmp_path / "going-on" / "last") is None
    held = load_file(tmp_path / "going-on" / "last" / "state" / "masters.safetensors")
    moved = [name for name, value in made.learner.masters().items() if not torch.equal(value, held[name])]
    assert moved, "training did not go on"


def live(self, tensors):
    return dict(tensors)


MUTANTS = {
    "moments and weights alias the live ones": ("full", snapshot.Copies, "take", live),
    "an adapter aliases the live one": ("lora", snapshot.Copies, "take", live),
    "live weights of a whole model": ("full", causal_lm.CausalLearner, "saver",
        lambda self, values, right=causal_lm.CausalLearner.saver: right(self, self.changing())),
    "live weights of an adapter": ("lora", causal_lm.CausalLearner, "saver",
        lambda self, values, right=causal_lm.CausalLearner.saver: right(self, self.changing())),
    "live moments": ("full", checkpoints, "copied",
        lambda copies, state, values, right=checkpoints.copied: (state, right(copies, state, values)[1])),
    "the live config": ("full", save, "still", lambda model, adapted: model),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_mutant_that_reads_what_training_changes_is_seen(mutant, tmp_path, monkeypatch):
    kind, where, name, wrong = MUTANTS[mutant]
    made = Made(tmp_path, **KINDS[kind])
    monkeypatch.setattr(where, name, wrong)
    waited, went_on = both(made, tmp_path, monkeypatch)
    assert waited != went_on


def test_one_is_written_at_a_time_and_the_second_needs_no_more_memory(tmp_path, monkeypatch):
    made = Made(tmp_path)
    made.train()
    monkeypatch.setenv("FINETUNER_SLOW", "fsync:0.02")
    with made.checkpoints(tmp_path / "out", background=True) as saving:
        saving.save(2, {}, None)
        assert not (tmp_path / "out" / "checkpoint-2").exists()
        made.train(1)
        saving.save(3, {}, None)
        assert verify(tmp_path / "out" / "checkpoint-2") is None
        assert not (tmp_path / "out" / "checkpoint-3").exists()
        assert saving._copies.needs(checkpoints.named(made.engine.state(), made.learner.changing())) == 0
    assert verify(tmp_path / "out" / "checkpoint-3") is None


def train(folder, monkeypatch, *overrides):
    monkeypatch.chdir(folder)
    return runner.train(load("config.py", overrides))


@pytest.mark.parametrize("background", [True, False])
def test_a_run_ends_with_its_last_checkpoint_in_place(background, tmp_path, monkeypatch, capsys):
    world.make(tmp_path, until="Steps(3)", every=1)
    monkeypatch.setenv("FINETUNER_SLOW", "rename:0.2")
    monkeypatch.setattr(checkpoint, "rotate", lambda *_, right=checkpoint.rotate: (time.sleep(0.2), right(*_)))
    assert train(tmp_path, monkeypatch, f"save.background={background}") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-3"
    assert "done: " in capsys.readouterr().err


@pytest.mark.parametrize("how", ["stop file", "signal"])
def test_a_halt_waits_for_the_write(how, tmp_path, monkeypatch):
    world.make(tmp_path, until="Steps(50)", every=100)
    monkeypatch.setenv("FINETUNER_SLOW", "rename:0.3")
    right = Milestones.__call__

    def halting(self, step):
        if step.number == 3 and how == "signal":
            signal.raise_signal(signal.SIGTERM)
        elif step.number == 3:
            (tmp_path / "out" / "STOP").touch()
        return right(self, step)

    monkeypatch.setattr(Milestones, "__call__", halting)
    assert train(tmp_path, monkeypatch) == (143 if how == "signal" else 0)
    assert verify(tmp_path / "out" / "checkpoint-3") is None
    assert (tmp_path / "out" / "last").resolve().name == "checkpoint-3"


FULL = CheckpointError(Problem("E-DISK-FULL", "disk full: need 2 GB, have 1 GB"))


def full(*_):
    raise FULL


def steps_after_the_failure(tmp_path, monkeypatch):
    """Steps that a run still took after a write that fails at step 10 of 40."""
    world.make(tmp_path, until="Steps(40)", every=10)
    monkeypatch.setattr(checkpoint, "write", full)
    monkeypatch.setattr(Milestones, "__call__", slowly(Milestones.__call__))
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, monkeypatch)
    assert caught.value is FULL
    return world.losses(tmp_path / "out")[-1][0] - 10


def slowly(right):
    def call(self, step):
        answer = right(self, step)
        time.sleep(0.02 if step.number == 10 else 0)
        return answer

    return call


def test_what_cannot_be_written_ends_the_run_at_the_next_step_with_the_same_error(tmp_path, monkeypatch):
    assert steps_after_the_failure(tmp_path, monkeypatch) == 1


def test_the_law_notices_an_error_that_waits_for_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "check", lambda self: None)
    assert steps_after_the_failure(tmp_path, monkeypatch) == 10


@pytest.mark.parametrize("every", [2, 100])
def test_an_error_of_the_last_write_is_not_lost(every, tmp_path, monkeypatch, capsys):
    world.make(tmp_path, until="Steps(2)", every=every)
    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(CheckpointError, match="E-DISK-FULL"):
        train(tmp_path, monkeypatch)
    assert "done" not in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_stops_itself_leaves_the_checkpoint_that_was_under_way(fails, tmp_path, monkeypatch, capsys):
    world.make(tmp_path, until="Steps(9)", every=3)
    monkeypatch.setenv("FINETUNER_SLOW", "rename:0.2")
    if fails:
        monkeypatch.setattr(checkpoint, "link", lambda *_: (time.sleep(0.5), full()))
    right = loop.Step

    def stopping(number, *values):
        if number == 4:
            raise TrainingStopped(Problem("E-LOSS", "no number"))
        return right(number, *values)

    monkeypatch.setattr(loop, "Step", stopping)
    with pytest.raises(TrainingStopped, match="E-LOSS"):
        train(tmp_path, monkeypatch)
    assert verify(tmp_path / "out" / "checkpoint-3") is None
    assert ("E-DISK-FULL" in capsys.readouterr().err) == fails


def test_without_memory_for_a_copy_the_run_waits_and_says_so_once(tmp_path, monkeypatch, capsys):
    world.make(tmp_path, until="Steps(4)", every=1)
    monkeypatch.setattr(checkpoints.Writer, "begin", None)
    monkeypatch.setattr(snapshot, "available", lambda: 1000)
    assert train(tmp_path, monkeypatch) == 0
    assert capsys.readouterr().err.count("training waits while a checkpoint is written") == 1
    assert verify(tmp_path / "out" / "last") is None
