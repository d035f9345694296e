"""What the dial of activation checkpointing costs and saves: k of 8 layers, in one run.

    python benchmarks/dial.py [--tokens 1024] [--rounds 5]

A step (forward and backward) of a small Llama over one packed row. The settings take turns; a ratio is of two times of
one round, against k = 0. What is saved for the backward pass is counted by torch's hooks, weights left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from toy import CONFIG, write_tokenizer

from finetuner import CausalLM, Fresh
from finetuner.data.batch import Batch
from finetuner.model.build import build
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.layers import decoder_layers
from finetuner.model.probe import saved

LAYERS = 8
DOCUMENTS = 4
CHOICES = {f"k = {count}": {"checkpointing": count} for count in (0, 2, 4, 8)} | {
    "k = 8, tiles of 256": {"checkpointing": 8, "tiled_mlp": 256},
    "k = 0, tiles of 256": {"checkpointing": 0, "tiled_mlp": 256},
}


def row(tokens: int) -> Batch:
    """A row of equal documents, all of whose tokens but the last are learned."""
    length = tokens // DOCUMENTS
    tokens_1T = torch.randint(0, 250, (1, length * DOCUMENTS), generator=torch.Generator().manual_seed(0))
    positions_1T = torch.arange(length).repeat(DOCUMENTS)[None]
    lengths, rows = (length,) * DOCUMENTS, tuple(range(DOCUMENTS))
    return Batch(tokens_1T, tokens_1T.roll(-1, 1), positions_1T, lengths, rows, length * DOCUMENTS)


def seconds(learner: CausalLearner, batch: Batch) -> float:
    """Of one step."""
    begin = time.process_time()
    learner(batch).backward()
    learner.zero_grad(set_to_none=True)
    return time.process_time() - begin


def mebibytes(learner: CausalLearner, batch: Batch) -> float:
    """Held for the backward pass when the forward pass is over."""
    with saved(learner.parameters()) as storages:
        learner(batch)
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    batch = row(args.tokens)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        write_tokenizer(Path(name))
        fresh = Fresh({**CONFIG, "num_hidden_layers": LAYERS}, name)
        learners = {
            title: build(CausalLM(fresh, dtype="float32", **choice), torch.device("cpu"), dialogues=False).learner
            for title, choice in CHOICES.items()
        }
    assert all(len(decoder_layers(learner.causal)) == LAYERS for learner in learners.values())
    times: dict[str, list[float]] = {title: [] for title in learners}
    for number in range(args.rounds + 1):
        for title, learner in learners.items():
            spent = seconds(learner, batch)
            if number:  # the first round warms up
                times[title].append(spent)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.tokens} tokens, {args.rounds} rounds")
    print(f"{'':<20} {'MiB saved':>10} {'ms a step':>10} {'time against k = 0: min, median, max':>38}")
    for title, learner in learners.items():
        ratios = [spent / plain for spent, plain in zip(times[title], times["k = 0"])]
        spread = f"{min(ratios):.2f} {statistics.median(ratios):.2f} {max(ratios):.2f}"
        held, middle = mebibytes(learner, batch), statistics.median(times[title]) * 1e3
        print(f"{title:<20} {held:>10.1f} {middle:>10.0f} {spread:>38}")


if __name__ == "__main__":
    main()
