"""Where the time and the memory of a step go: tables, and a trace to look at in a viewer.

    material, engine as in training -> two steps to warm up -> N steps by the clock, part by part
    -> N steps under torch's profiler -> trace.json.gz, profile.json, the tables

- Parts are timed with the device waited for at each border, so their sum is a little more than a step of training.
- The weights change in memory only; the run's own folder is not touched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from finetuner.config.load import Loaded
from finetuner.config.run import Run
from finetuner.data.batch import Batch
from finetuner.data.feed import Feed
from finetuner.engine.engine import Engine
from finetuner.engine.speed import speed_of
from finetuner.errors import Problem, UsageError
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.probe import saved
from finetuner.model.work import work_of
from finetuner.runtime import dist
from finetuner.runtime.log import say
from finetuner.train.loop import gathered
from finetuner.train.ready import engine_of, gather
from finetuner.train.use import peak_memory

WARM = 2
OPERATORS = 12
PARTS = ("batches", "forward", "backward", "update")
INNER = ("attention", "feed-forward", "head and loss")
"""Of the forward pass."""


def profile(loaded: Loaded, folder: Path, steps: int) -> int:
    """Measures, prints the tables, writes trace.json.gz and profile.json into `folder`; gives the exit code.

    Raises:
        UsageError: no step to measure.
    """
    if steps < 1:
        raise UsageError(Problem("E-USAGE", "--steps counts steps", "--steps", str(steps), "1 or more"))
    run = loaded.run
    device = dist.choose_device(run.engine.device)
    material = gather(run)
    engine = engine_of(run, device)
    feed = Feed(material.samples, material.plan, 0, 1, run.batch.per_device)
    numbers = [step % feed.steps for step in range(WARM + 2 * steps)]
    for step in numbers[:WARM]:
        perform(engine, feed, step, run.seed, Clock(device))
    weights = memory_table(engine, feed.batches(numbers[0])[0])
    clock, waited = Clock(device), time.perf_counter()
    with timed_modules(engine.learner, clock):
        for step in numbers[WARM : WARM + steps]:
            perform(engine, feed, step, run.seed, clock)
    seconds = time.perf_counter() - waited
    folder.mkdir(parents=True, exist_ok=True)
    operators = traced(engine, feed, numbers[WARM + steps :], run, folder / "trace.json.gz")
    tokens = sum(int(feed.lengths(step).sum()) for step in numbers[WARM : WARM + steps])
    work = work_of(engine.learner.model, engine.learner.causal)
    operations = sum(work.of(feed.lengths(step), feed.learned(step)) for step in numbers[WARM : WARM + steps])
    speed = speed_of(device, engine.learner.compute)
    result = {
        "steps": steps,
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": round(operations / seconds / speed.operations, 4),
        "mfu_against": str(speed),
        "seconds_a_step": {part: round(clock.seconds.get(part, 0.0) / steps, 6) for part in (*PARTS, *INNER)},
        "operators": operators,
        "memory_mib": weights | {"peak": round(peak_memory() / 2**20, 1)},
    }
    (folder / "profile.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))
    say(f"{folder / 'trace.json.gz'}: open it in a trace viewer, such as ui.perfetto.dev")
    return 0


class Clock:
    """Adds up seconds by part; waits for the device at the borders."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times the block."""
        begin = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin


def perform(engine: Engine, feed: Feed, step: int, seed: int, clock: Clock) -> None:
    """One step of training, part by part; the forward pass is timed by `timed_modules`."""
    with clock.part("batches"):
        batches, learned = feed.batches(step), feed.learned(step)
    before = clock.seconds.get("forward", 0.0)
    with clock.part("both passes"):
        loss = gathered(engine, batches, learned, seed, step) / learned
    forward = clock.seconds.get("forward", 0.0) - before
    clock.seconds["backward"] = clock.seconds.get("backward", 0.0) + clock.seconds.pop("both passes") - forward
    with clock.part("update"):
        engine.step(step, 1.0, loss)
        engine.settle()


@contextmanager
def timed_modules(learner: CausalLearner, clock: Clock) -> Iterator[None]:
    """Times the forward passes of the learner, and of the attentions, feed-forwards and head in it, in the block.

    What is computed again in the backward pass counts as backward; the head makes its gradients along with the loss.
    """
    named: dict[nn.Module, str] = {learner: "forward", learner.causal.get_output_embeddings(): "head and loss"}
    for name, module in learner.causal.named_modules():
        last = name.rpartition(".")[2]
        if "attn" in last or "attention" in last:
            named[module] = "attention"
        elif last in ("mlp", "feed_forward", "block_sparse_moe"):
            named[module] = "feed-forward"
    begun: list[float] = []
    inside: list[bool] = []

    def before(module: nn.Module, *_: Any) -> None:
        if module is learner:
            inside.append(True)
        begun.append(clock.now())

    def after(module: nn.Module, *_: Any) -> None:
        took = clock.now() - begun.pop()
        if inside:
            clock.seconds[named[module]] = clock.seconds.get(named[module], 0.0) + took
        if module is learner:
            inside.pop()

    handles = [hook for m in named for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def memory_table(engine: Engine, batch: Batch) -> dict[str, float]:
    """MiB of weights, gradients and optimizer states, and of what one micro-batch keeps for its backward pass."""
    learner = engine.learner
    weights = sum(parameter.untyped_storage().nbytes() for parameter in unique(learner.parameters()))
    trained = sum(parameter.numel() * parameter.element_size() for _, parameter in learner.trainable())
    states = sum(tensor.numel() * tensor.element_size() for tensor in engine.state().moments.values())
    known = [*learner.parameters(), *learner.buffers()]
    with torch.enable_grad(), saved(known) as kept:
        learner(batch)
    activations = sum(storage.nbytes() for storage in kept.values())
    sizes = {"weights": weights, "gradients": trained, "optimizer": states, "activations": activations}
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def unique(parameters: Iterator[nn.Parameter]) -> Sequence[nn.Parameter]:
    """Parameters whose storages differ."""
    return list({parameter.untyped_storage().data_ptr(): parameter for parameter in parameters}.values())


def traced(engine: Engine, feed: Feed, numbers: Sequence[int], run: Run, file: Path) -> list[dict[str, Any]]:
    """Writes the trace of these steps; gives the operators that took most, by their own time."""
    cuda = engine.learner.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=kinds) as trace:
        for step in numbers:
            perform(engine, feed, step, run.seed, Clock(engine.learner.device))
    trace.export_chrome_trace(str(file))
    time_of = attrgetter("self_device_time_total" if cuda else "self_cpu_time_total")
    events = sorted(trace.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events)) or 1.0
    return [
        {
            "name": event.key,
            "share": round(time_of(event) / total, 4),
            "calls": event.count,
            "us": round(time_of(event)),
        }
        for event in events[:OPERATORS]
    ]


def tables(result: dict[str, Any]) -> str:
    """The result for a person."""
    seconds = result["seconds_a_step"]
    whole = sum(seconds[part] for part in PARTS) or 1.0
    rate, mfu = f"{result['tokens_per_second']:,.0f} tokens/s", f"MFU {result['mfu']:.1%} of {result['mfu_against']}"
    lines = [f"{rate}, {mfu}", "", "time of a step            ms   share"]
    for part in (*PARTS[:2], *INNER, *PARTS[2:]):
        name = f"  of it {part}" if part in INNER else part
        lines.append(f"{name:<20}{seconds[part] * 1e3:>9.1f}  {seconds[part] / whole:>5.1%}")
    lines += ["", "operators                                     share   calls"]
    lines += [f"{one['name'][:42]:<42}{one['share']:>9.1%}{one['calls']:>8}" for one in result["operators"]]
    lines += ["", "memory                  MiB"]
    return "\n".join(lines + [f"{name:<18}{size:>9.1f}" for name, size in result["memory_mib"].items()])
