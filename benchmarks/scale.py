"""How costs grow: with the rows of a data set, the tokens of a row, the ranks. Prints each curve and its exponent.

    python benchmarks/scale.py [--rows 7] [--tokens 65536] [--rounds 3] [--only rows|tokens|ranks]

- rows: 10^4 to 10^ROWS samples of random lengths: to pack them, to make the order of an epoch, to
  resume at 90 % and read the first batches there, to read one step more. Tokenising is linear: see `tokenise.py`.
- tokens: one step over rows of 1,024 to TOKENS tokens of a tiny model, of documents of 512 tokens and of one document.
- ranks: a run of the same rows on one process and on two: steps a second (on one machine's cores, which they share).

The exponent is the slope of a line through log(cost) over log(size): 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy import CONFIG, write_tokenizer

from finetuner import AdamW, CausalLM, Fresh, Steps
from finetuner.data import order
from finetuner.data.batch import Batch
from finetuner.data.feed import Feed
from finetuner.data.packs import pack_samples
from finetuner.data.samples import Samples
from finetuner.data.steps import Plan
from finetuner.engine.torch_engine import TorchEngine
from finetuner.model.build import build

LENGTH = 2048


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The slope of the line of least squares through the logarithms."""
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(cost) for cost in costs], 1)[0])


def curve(name: str, sizes: Sequence[int], costs: Sequence[float], scale: float, unit: str) -> None:
    """Prints a line of the table."""
    cells = "".join(f"{cost * scale:>11.4g}" for cost in costs)
    print(f"{name:<44}{cells}  {unit:<4}{exponent(sizes, costs):>6.2f}")


def header(title: str, sizes: Sequence[int]) -> None:
    print(f"\n{title:<44}{''.join(f'{size:>11,}' for size in sizes)}{'exponent':>13}")


def samples_of(count: int) -> Samples:
    """`count` samples of random lengths over one shared stream: only where they lie matters here."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, count), 8, LENGTH).astype(np.int64)
    starts = np.random.default_rng(1).integers(0, 1 << 20, count)
    stream = np.zeros((1 << 20) + LENGTH, np.int32)
    numbers = np.arange(count, dtype=np.int64)
    learned = (lengths // 2).astype(np.int32)
    return Samples((stream,), starts, starts + lengths, learned, numbers, np.ones(count, np.bool_), LENGTH, True, {})


def row_costs(size: int, rounds: int) -> tuple[float, float, float, float]:
    """Seconds for `size` samples: packing, the order of an epoch, resuming at 90 %, one step more."""
    samples = samples_of(size)
    packing = min(seconds(lambda: pack_samples(samples, seed=0)) for _ in range(min(rounds, 2)))
    packs = pack_samples(samples, seed=0)
    steps = 3 * len(packs) // 16
    feed = Feed(samples, Plan(packs, 16, Steps(steps), 0), 0, 1, 4)
    far = int(steps * 0.9)

    def new_order() -> None:
        order.permutation.cache_clear()
        feed.plan.rows(steps - 1)

    def resumed() -> None:
        order.permutation.cache_clear()
        feed.batches(far)

    more = min(seconds(lambda: feed.batches(far)) for _ in range(10 * rounds))
    return packing, *(min(seconds(work) for _ in range(rounds)) for work in (new_order, resumed)), more


def by_rows(most: int, rounds: int) -> None:
    """Packing, order and resume over the number of samples."""
    sizes = [10**power for power in range(4, most + 1)]
    row_costs(1000, 1)  # the first batches of a process load what the others find
    packing, ordering, resuming, more = zip(*(row_costs(size, rounds) for size in sizes), strict=True)
    header("samples", sizes)
    curve("packing all", sizes, packing, 1, "s")
    curve("the order of an epoch", sizes, ordering, 1e3, "ms")
    curve("resume at 90 %: order and first batches", sizes, resuming, 1e3, "ms")
    curve("the batches of one step more", sizes, more, 1e3, "ms")


def row(tokens: int, document: int) -> Batch:
    """A row of documents, a tenth of whose places are learned."""
    tokens_1T = (torch.arange(tokens) % 250)[None]
    targets_1T = torch.where(torch.arange(tokens) % 10 == 0, tokens_1T, -100)
    count = tokens // document
    positions_1T = torch.arange(document).repeat(count)[None]
    return Batch(
        tokens_1T, targets_1T, positions_1T, (document,) * count, tuple(range(count)), len(range(0, tokens, 10))
    )


def by_tokens(folder: Path, most: int, rounds: int) -> None:
    """A step over the tokens of its row."""
    config = {**CONFIG, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config["max_position_embeddings"] = most
    model = CausalLM(Fresh(config, str(folder / "tokenizer")), dtype="float32", checkpointing=True)
    engine = TorchEngine(
        build(model, torch.device("cpu"), dialogues=False).learner, AdamW(lr=1e-4), torch.device("cpu")
    )
    sizes = [1 << power for power in range(10, int(math.log2(most)) + 1)]
    short = [step_seconds(engine, row(size, 512), rounds) for size in sizes]
    whole = [step_seconds(engine, row(size, size), rounds) for size in sizes]
    header("tokens of a row", sizes)
    curve("a step, documents of 512 tokens", sizes, short, 1e3, "ms")
    curve("a step, one document", sizes, whole, 1e3, "ms")


def step_seconds(engine: TorchEngine, batch: Batch, rounds: int) -> float:
    """The quickest of a few steps over the batch, after one to warm up; of long rows, which need none, one step."""

    def step() -> None:
        loss = engine.accumulate(batch, batch.learned, last=True).double()
        engine.step(0, 1.0, loss / batch.learned)

    if len(batch.tokens_1T[0]) > 16384:
        return seconds(step)
    return min([seconds(step) for _ in range(rounds + 1)][1:])


RUN = """
from finetuner import *

config = Run(
    model=CausalLM(Fresh({config}, "tokenizer"), dtype="float32", checkpointing=False),
    data=Dialogues(Json("rows.jsonl"), length=1024), optim=AdamW(lr=1e-4),
    batch=BatchSize(total=8, per_device=1), until=Steps(8), save=Saves(every=None), log=Logs(every=Steps(4)),
)
"""


def by_ranks(folder: Path) -> None:
    """The same run on one process and on two, each with one thread; its own report gives the rate."""
    from loop import rows

    rows(folder / "rows.jsonl", 400)
    (folder / "run.py").write_text(RUN.format(config=CONFIG))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    rates = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "finetuner", "train", "run.py", "--folder", f"out{ranks}"]
        done = subprocess.run([*command, "--nproc", str(ranks)], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads((folder / f"out{ranks}" / "run_report.json").read_text())
        rates.append(report["starts"][-1]["tokens_per_second"])
    print(f"\n{'ranks':<44}{1:>11}{2:>11}")
    print(f"{'tokens/s':<44}{rates[0]:>11,.0f}{rates[1]:>11,.0f}   x{rates[1] / rates[0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=7, help="10 to this power at most")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("rows", "tokens", "ranks"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name) / "tokenizer")
        if options.only in (None, "rows"):
            by_rows(options.rows, options.rounds)
        if options.only in (None, "tokens"):
            by_tokens(Path(name), options.tokens, options.rounds)
        if options.only in (None, "ranks"):
            by_ranks(Path(name))


if __name__ == "__main__":
    main()
