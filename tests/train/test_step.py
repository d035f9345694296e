"""A step's gradient is the same for every (batch size, accumulation, packing, ranks) that cuts the same rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import rig
import torch
import torch.nn.functional as F

from finetuner import AdamW, CausalLM, Constant, Dialogues, Json, Steps
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.data.steps import Plan
from finetuner.engine import torch_engine
from finetuner.engine.torch_engine import TorchEngine
from finetuner.errors import TrainingStopped
from finetuner.model.build import build
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
from finetuner.train import loop

WORDS = ["one", "two", "three", "five", "eight", "thirteen", "twenty-one", "thirty-four"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight rows whose answers have very different lengths, and a tiny model."""
    folder = tmp_path_factory.mktemp("step")
    rig.tiny_llama(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number, length in enumerate((1, 2, 3, 5, 8, 13, 21, 34)):
            turns = [("user", f"say {number}"), ("assistant", " ".join(WORDS[(number + k) % 8] for k in range(length)))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return folder


def made(world, *, pack=False, per_device=1, rank=0, ranks=1, total=8, length=512):
    """Learner and feed over the eight rows."""
    model = CausalLM(str(world / "model"), dtype="float32", checkpointing=False)
    data = Dialogues(Json(str(world / "rows.jsonl")), length=length, pack=pack)
    samples = prepare(data, encoder_spec(load_tokenizer(model)), cache=world / "cache", workers=0)
    packs = pack_samples(samples, seed=0)
    feed = Feed(samples, Plan(packs, min(total, len(packs)), Steps(1), 0), rank, ranks, per_device)
    return build(model, torch.device("cpu"), dialogues=True).learner, feed


def gradient(world, **cut):
    """Gradient of one step by our engine, cut in that way; the sums of the ranks are added up."""
    total = None
    for rank in range(cut.get("ranks", 1)):
        learner, feed = made(world, **(cut | {"rank": rank}))
        engine = TorchEngine(learner, AdamW(lr=1e-3), torch.device("cpu"))
        for batch in feed.batches(0):
            engine.accumulate(batch, feed.learned(0), last=True)
        own = {name: p.grad.clone() for name, p in learner.trainable()}
        total = own if total is None else {name: total[name] + own[name] for name in own}
    return total


def reference(world):
    """The oracle: each row by itself through plain transformers, summed loss over all target tokens of the step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    loss, count = 0.0, 0
    for line in (world / "rows.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        head = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(head, add_special_tokens=False).input_ids
        ids = tokenizer(head + assistant["content"] + "<|im_end|>\n", add_special_tokens=False).input_ids
        end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        logits = model(torch.tensor([ids])).logits[0]
        loss = loss + F.cross_entropy(
            logits[len(prompt) - 1 : end], torch.tensor(ids[len(prompt) : end + 1]), reduction="sum"
        )
        count += end + 1 - len(prompt)
    (loss / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}, float(loss.detach() / count)


def distance(got, wanted):
    over = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
    return over / sum(float(value.square().sum()) for value in wanted.values()) ** 0.5


CUTS = [
    {"per_device": 1}, {"per_device": 2}, {"per_device": 4}, {"per_device": 8}, {"per_device": 3},
    {"pack": True, "length": 256}, {"pack": True, "length": 512}, {"ranks": 2}, {"ranks": 3},
    {"ranks": 2, "per_device": 4},
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_however_a_step_is_cut_its_gradient_is_the_oracles(world, cut):
    wanted, _ = reference(world)
    assert distance(gradient(world, **cut), wanted) <= 1e-5


def test_the_law_notices_means_of_means(world, monkeypatch):
    real = TorchEngine.accumulate

    def mean_of_means(self, batch, learned, *, last):
        return real(self, batch, batch.learned * 8, last=last)

    monkeypatch.setattr(torch_engine.TorchEngine, "accumulate", mean_of_means)
    wanted, _ = reference(world)
    assert distance(gradient(world, per_device=1), wanted) > 0.1


def performed(world, monkeypatch=None, **more):
    """One step of the loop; what it told, and the weights before and after."""
    learner, feed = made(world)
    engine = TorchEngine(learner, AdamW(lr=1e-3), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in learner.trainable()}
    told = []

    def broken(step, batches, value, what):
        from finetuner.errors import Problem

        return Problem("E-TRAIN-NONFINITE", f"{what} {value} {step}")

    loop.train(engine, feed, Constant(), (told.append,), start=0, seed=0, broken=broken)
    return told[0].read(), before, {name: p.detach() for name, p in learner.trainable()}


def test_the_logged_loss_is_the_token_mean(world):
    step, _, _ = performed(world)
    assert step.loss == pytest.approx(reference(world)[1], rel=1e-6)


def test_a_gradient_that_is_not_finite_changes_no_weight(world, monkeypatch):
    kept = SimpleNamespace(model=None)
    real = TorchEngine.step

    def poisoned(self, *given):
        kept.before = {name: p.detach().clone() for name, p in self.learner.trainable()}
        kept.model = self.learner
        self.learner.trainable()[3][1].grad.view(-1)[0] = float("nan")
        return real(self, *given)

    monkeypatch.setattr(TorchEngine, "step", poisoned)
    with pytest.raises(TrainingStopped, match="E-TRAIN-NONFINITE"):
        performed(world)
    assert all(torch.equal(kept.before[name], p) for name, p in kept.model.trainable())


def test_a_loss_that_is_not_finite_is_told_before_the_update(world, monkeypatch):
    real = TorchEngine.accumulate
    monkeypatch.setattr(TorchEngine, "accumulate", lambda *a, **k: real(*a, **k) * float("inf"))
    kept = SimpleNamespace()
    step = TorchEngine.step

    def noted(self, *given):
        kept.model, kept.before = self.learner, {name: p.detach().clone() for name, p in self.learner.trainable()}
        return step(self, *given)

    monkeypatch.setattr(TorchEngine, "step", noted)
    with pytest.raises(TrainingStopped, match="the loss inf"):
        performed(world)
    assert all(torch.equal(kept.before[name], p) for name, p in kept.model.trainable())
