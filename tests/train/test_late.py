"""Where the host learns of a step that was not finite only later, it names that step; no weight has changed since."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rig
import torch

from finetuner import AdamW, CausalLM, Constant, Dialogues, Json, Steps
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.data.steps import Plan
from finetuner.engine.torch_engine import TorchEngine
from finetuner.engine.watch import Watch
from finetuner.errors import Problem, TrainingStopped
from finetuner.model.build import build
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
from finetuner.train import loop

CPU = torch.device("cpu")
BAD = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    rig.tiny_llama(folder / "model")
    rows = [[("user", f"say {n}"), ("assistant", f"{n} it is")] for n in range(12)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def made(world: Path, lag: int) -> tuple[TorchEngine, Feed]:
    """An engine that learns of a step `lag` steps later, and a feed of six steps of two rows."""
    model = CausalLM(str(world / "model"), dtype="float32", checkpointing=False)
    data = Dialogues(Json(str(world / "rows.jsonl")), length=512, pack=False)
    samples = prepare(data, encoder_spec(load_tokenizer(model)), cache=world / "cache", workers=0)
    feed = Feed(samples, Plan(pack_samples(samples, seed=0), 2, Steps(6), 0), 0, 1, 1)
    torch.manual_seed(0)
    engine = TorchEngine(build(model, CPU, dialogues=True).learner, AdamW(lr=1e-2), CPU)
    engine._watch = Watch(CPU, lag)
    return engine, feed


def spoil(engine: TorchEngine, feed: Feed, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss, or one gradient, of step `BAD` not finite, each time that it is gone through."""
    rows = {batch.rows for batch in feed.batches(BAD)}
    real, now = engine.accumulate, []

    def accumulate(batch: Any, learned: int, *, last: bool) -> torch.Tensor:
        now[:] = [batch.rows in rows]
        loss = real(batch, learned, last=last)
        return loss * torch.inf if what == "loss" and now[0] else loss

    monkeypatch.setattr(engine, "accumulate", accumulate)
    if what == "gradient":
        _, parameter = engine.learner.trainable()[3]
        parameter.register_hook(lambda grad: grad * torch.nan if now[0] else grad)


def weights(engine: TorchEngine) -> Iterator[torch.Tensor]:
    return (parameter.detach().clone() for _, parameter in engine.learner.trainable())


def run(engine: TorchEngine, feed: Any, listener: Any) -> list[tuple[Any, ...]]:
    """What was told of the broken step."""
    told: list[tuple[Any, ...]] = []

    def broken(step: int, batches: Any, value: float, what: str) -> Problem:
        told.append((step, [batch.rows for batch in batches], value, what))
        return Problem("E-TRAIN-NONFINITE", what)

    with pytest.raises(TrainingStopped, match="E-TRAIN-NONFINITE"):
        loop.train(engine, feed, Constant(), (listener,), start=0, seed=0, broken=broken)
    return told


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_step_is_named_and_the_weights_are_those_before_it(
    world: Path, lag: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, feed = made(world, lag)
    spoil(engine, feed, what, monkeypatch)
    after: dict[int, list[torch.Tensor]] = {}
    told = run(engine, feed, lambda step: after.update({step.number: list(weights(engine))}))
    ((step, rows, value, named),) = told
    assert (step, rows) == (BAD, [batch.rows for batch in feed.batches(BAD)])
    assert value == torch.inf if what == "loss" else value != value
    assert named == ("the loss" if what == "loss" else f"the gradient of {engine.learner.trainable()[3][0]}")
    assert all(torch.equal(one, other) for one, other in zip(after[BAD], weights(engine), strict=True))
    assert not torch.equal(after[1][0], after[BAD][0]), "the steps before it did train"


def test_reading_a_step_tells_of_it_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, feed = made(world, 5)
    spoil(engine, feed, "loss", monkeypatch)
    read: list[int] = []

    def listener(step: loop.Step) -> None:
        step.read()
        read.append(step.number)

    run(engine, feed, listener)
    assert read == [1, 2]
