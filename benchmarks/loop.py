"""What finetuner's loop costs above a bare torch loop over the same model and the same batches.

    python benchmarks/loop.py [--steps 6] [--rounds 5]

Both train a small Llama by the same forward, backward, clipping and fused AdamW; ours adds what a run has besides: the
plan, collating, seeding, the finite checks, the schedule, metrics.jsonl and the log lines. They take turns; a ratio is
of two times of one round. Steps are long enough (hundreds of milliseconds) that noise does not decide.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from toy import CONFIG, write_tokenizer

from finetuner import AdamW, BatchSize, CausalLM, Constant, Dialogues, Fresh, Json, Logs, Run, Steps
from finetuner.data.ahead import Ahead
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.data.steps import Plan
from finetuner.engine.build import build_engine
from finetuner.engine.speed import speed_of
from finetuner.errors import Problem
from finetuner.model.build import build
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
from finetuner.model.work import work_of
from finetuner.train.loop import train
from finetuner.train.metrics import Metrics
from finetuner.train.use import Use


def rows(file: Path, count: int) -> None:
    """Writes `count` made conversations."""
    draw = random.Random(0)
    words = ["lamp", "river", "window", "stands", "runs", "sings", "below", "near", "while", "three", "the", "a"]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            said = [" ".join(draw.choices(words, k=draw.randint(4, 60))) for _ in range(2)]
            messages = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
            out.write(json.dumps({"messages": messages}) + "\n")


def bare(learner: torch.nn.Module, feed: Feed, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of the plainest loop: the batches are made beforehand."""
    held = [(feed.batches(step), feed.learned(step)) for step in range(feed.steps)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    begin = time.perf_counter()
    for batches, learned in held:
        for batch in batches:
            (learner(batch) / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def unexpected(*what: Any) -> Problem:
    raise AssertionError(what)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        rows(folder / "rows.jsonl", 400)
        run = Run(
            model=CausalLM(Fresh(CONFIG, str(folder / "tokenizer")), dtype="float32", checkpointing=False),
            data=Dialogues(Json(str(folder / "rows.jsonl")), length=1024),
            optim=AdamW(lr=1e-4), batch=BatchSize(total=4, per_device=2), until=Steps(args.steps),
            schedule=Constant(), log=Logs(every=Steps(1)),
        )  # fmt: skip
        samples = prepare(run.data, encoder_spec(load_tokenizer(run.model)), cache=folder / "cache", workers=0)
        feed = Feed(samples, Plan(pack_samples(samples, seed=0), run.batch.total, run.until, 0), 0, 1, 2)
        learner = build(run.model, torch.device("cpu"), dialogues=True).learner
        engine = build_engine(run, learner, torch.device("cpu"))
        speed = speed_of(torch.device("cpu"), torch.float32)
        ours, plain, ratios = [], [], []
        for number in range(args.rounds + 1):
            plain_s = bare(learner, feed, engine.optimizer)
            with contextlib.redirect_stderr(io.StringIO()):
                use = Use(work_of(learner.model, learner.causal), speed)
                plan = feed.plan
                metrics = Metrics(run, folder, start=0, steps=plan.steps, steps_per_epoch=plan.steps_per_epoch, use=use)
                begin = time.perf_counter()
                with Ahead(feed, pinned=False) as ahead:
                    train(engine, ahead, run.schedule, (metrics,), start=0, seed=0, broken=unexpected)
                ours_s = time.perf_counter() - begin
            if number:  # the first round warms up
                ours.append(ours_s)
                plain.append(plain_s)
                ratios.append(ours_s / plain_s)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.rounds} rounds of {args.steps} steps")
    for title, values, scale in (("bare ms/step", plain, 1e3 / args.steps), ("ours ms/step", ours, 1e3 / args.steps),
                                 ("ratio", ratios, 1.0)):  # fmt: skip
        low, middle, high = min(values) * scale, statistics.median(values) * scale, max(values) * scale
        print(f"{title:<14} min {low:9.3f}  median {middle:9.3f}  max {high:9.3f}")


if __name__ == "__main__":
    main()
