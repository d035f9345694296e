"""How long a step is held up by a checkpoint: written while training waits, and in the background.

    python benchmarks/saves.py [--rounds 5] [--steps 8]

A small Llama is trained in full and through LoRA. Each round takes the same number of steps three times, in turn: none
saved, the second one saved while training waits, the second one saved in the background. Printed are

- held up: from the end of a step until the next can begin, in the step that saves;
- all steps: those after it too, which share the cores with the thread that writes, above the steps of the run that
  saves nothing. Where training has a GPU, they do not share it;
- CPU time: of the whole process, above the run that saves nothing: what a save costs where no core is idle;
- on disk after: from the save until the checkpoint is there as a whole.

A ratio is of two times of one round.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from toy import CONFIG, write_tokenizer

from finetuner import AdamW, BatchSize, CausalLM, Documents, Fresh, LoRA, Run, Saves, Steps, Text
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.data.steps import Plan
from finetuner.engine import checkpoint
from finetuner.engine.build import build_engine
from finetuner.engine.engine import Engine
from finetuner.model.build import build
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
from finetuner.train.checkpoints import Checkpoints

MODEL = CONFIG | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
LENGTH = 128
SAVED = 1
"""The step that saves; the first one warms up."""


class Timed:
    """The times of some steps, one of which may save."""

    def __init__(self, run: Run, engine: Engine, feed: Feed, steps: int, *, save: bool, folder: Path) -> None:
        there = [0.0]
        right = checkpoint.link

        def linked(folder: Path, name: str, path: Path) -> None:
            there[0] = time.perf_counter()
            right(folder, name, path)  # type: ignore[arg-type]

        checkpoint.link = linked  # type: ignore[assignment]
        begin, worked = time.perf_counter(), time.process_time()
        with Checkpoints(run, folder, engine, identity="bench", base=None) as checkpoints:
            for step in range(steps):
                one_step(engine, feed)
                if save and step == SAVED:
                    before = time.perf_counter()
                    checkpoints.save(step + 1, {}, None)
                    self.held_up = time.perf_counter() - before
            self.steps = time.perf_counter() - begin
        checkpoint.link = right
        self.work = time.process_time() - worked
        if save:
            self.there = there[0] - before


def one_step(engine: Engine, feed: Feed) -> None:
    """A forward and a backward pass over a row, and the update, without a run around it."""
    for batch in feed.batches(0):
        engine.accumulate(batch, feed.learned(0), last=True)
    engine.optimizer.step()  # type: ignore[attr-defined]
    engine.optimizer.zero_grad()  # type: ignore[attr-defined]


def measure(folder: Path, kind: str, rounds: int, steps: int) -> None:
    """Prints the rows of one way to train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = LoRA(rank=64) if kind == "LoRA" else None
    model = CausalLM(str(folder / "base"), dtype="float32", checkpointing=False, adapter=adapter)
    run = Run(
        model=model, data=Documents(Text(str(folder / "text.txt")), length=LENGTH), optim=AdamW(lr=1e-5),
        batch=BatchSize(total=1), until=Steps(1), save=Saves(keep=1),
    )  # fmt: skip
    samples = prepare(run.data, encoder_spec(load_tokenizer(model)), cache=folder / "cache", workers=0)
    feed = Feed(samples, Plan(pack_samples(samples, seed=0), 1, run.until, 0), 0, 1, 1)
    learner = build(model, device, dialogues=False).learner
    engine = build_engine(run, learner, device)
    waiting = dataclasses.replace(run, save=Saves(keep=1, background=False))
    kept: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        none, wait, back = (
            Timed(config, engine, feed, steps, save=save, folder=folder / "out")
            for config, save in ((run, False), (waiting, True), (run, True))
        )
        size = sum(file.stat().st_size for file in (folder / "out" / "last").resolve().rglob("*") if file.is_file())
        shutil.rmtree(folder / "out")
        if number:  # the first round warms up
            found = {
                "a step, ms": none.steps / steps * 1e3,
                "held up, waiting, ms": wait.held_up * 1e3, "held up, background, ms": back.held_up * 1e3,
                "held up, ratio": wait.held_up / back.held_up,
                "all steps, waiting, ms more": (wait.steps - none.steps) * 1e3,
                "all steps, background, ms more": (back.steps - none.steps) * 1e3,
                "CPU time, waiting, ms more": (wait.work - none.work) * 1e3,
                "CPU time, background, ms more": (back.work - none.work) * 1e3,
                "on disk after, waiting, ms": wait.there * 1e3, "on disk after, background, ms": back.there * 1e3,
            }  # fmt: skip
            for name, value in found.items():
                kept.setdefault(name, []).append(value)
    trains = learner.what_trains()
    print(f"{kind}: {trains.trained:,} of {trains.all:,} weights train, {size:,} bytes a checkpoint")
    for name, values in kept.items():
        print(f"  {name:<32} min {min(values):9.1f}  median {statistics.median(values):9.1f}  max {max(values):9.1f}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.rounds} rounds of {args.steps} steps")
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name) / "tokenizer")
        (Path(name) / "text.txt").write_text("A lamp by the river stands near three windows.\n" * 200)
        fresh = CausalLM(Fresh(MODEL, str(Path(name) / "tokenizer")), dtype="float32", checkpointing=False)
        build(fresh, torch.device("cpu"), dialogues=False).learner.save(Path(name) / "base")
        for kind in ("full", "LoRA"):
            measure(Path(name), kind, args.rounds, args.steps)


if __name__ == "__main__":
    main()
