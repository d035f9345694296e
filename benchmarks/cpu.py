"""What can be told without a GPU: ours against what a peer does, on one thread, by processor time, in one run.

    python benchmarks/cpu.py [--rounds 3] [--only WORD] [--quick] [--check]

- Every ratio is of two measurements of one round, taken in turn; min, median and max over the rounds are shown.
- `--check` ends with 1 if a median misses what is asked of it (the last column); `--quick` takes the small sizes that
  the tests run, and asks for 0.6 of the lead: less of their work is that which differs.
- Peers are transformers' own ways (its collator's padding, its loss, its masks), a loop over single documents, and a
  pipeline of passes as XTuner 0.2 has it. Whole trainers in their own environments: `peers.py`.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import CONFIG, write_tokenizer

from finetuner import AdamW, CausalLM, Dialogues, Fresh, Json, Steps
from finetuner.data.feed import Feed
from finetuner.data.pack import pack
from finetuner.data.packs import pack_samples
from finetuner.data.samples import Samples, prepare
from finetuner.data.steps import Plan
from finetuner.dialogue.encode import EncoderSpec
from finetuner.dialogue.rows import openai
from finetuner.engine.torch_engine import TorchEngine
from finetuner.model.build import build
from finetuner.model.head import loss_sum

CPU = torch.device("cpu")
LENGTH = 2048


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    documents: int
    vocabulary: int
    hidden: int
    places: int
    rows: int
    packed: int


FULL = Sizes(documents=48, vocabulary=32_000, hidden=256, places=4096, rows=5000, packed=100_000)
QUICK = Sizes(documents=24, vocabulary=8000, hidden=128, places=2048, rows=600, packed=20_000)


@dataclass(frozen=True)
class Row:
    """A line of the table: ratios of one kind over the rounds, and what is asked of their median."""

    name: str
    values: tuple[float, ...]
    least: float | None = None
    most: float | None = None
    unit: str = "x"
    slack: ClassVar[float] = 1.0
    """What is asked of ratios is multiplied with, or divided by."""

    @property
    def holds(self) -> bool:
        middle, slack = statistics.median(self.values), self.slack if self.unit == "x" else 1.0
        return (self.least is None or middle >= self.least * slack) and (
            self.most is None or middle <= self.most / slack
        )

    def __str__(self) -> str:
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        asked = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}" if self.most is not None else ""
        figures = f"{low:>9.3g}{middle:>9.3g}{high:>9.3g} {self.unit:<3}"
        return f"{self.name:<58}{figures}{asked:>10}  {'' if self.holds else 'MISSED'}"


def clocked(work: Callable[[], Any]) -> float:
    """Processor seconds of `work`."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ratios(rounds: int, one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, ...]:
    """Time of `one` over that of `other`, in turn; a first round of both warms up."""
    found = [clocked(one) / clocked(other) for _ in range(rounds + 1)]
    return tuple(found[1:])


# --- training a step ---------------------------------------------------------------------------------------------


def documents(sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of chat-like documents: lognormal lengths of up to 1,024, about 40 % of the places learned.

    In the order drawn, eight padded to the longest are 37 % full; sorted by length, 71 %.
    """
    draw = np.random.default_rng(2)
    made = []
    for length in np.clip(draw.lognormal(5.0, 0.9, sizes.documents), 16, 1024).astype(int):
        tokens = torch.from_numpy(draw.integers(3, sizes.vocabulary, length))
        labels = tokens.clone()
        labels[: int(length * 0.6)] = -100
        made.append((tokens, labels))
    return made


def samples_of(made: Sequence[tuple[Tensor, Tensor]], *, packed: bool) -> Samples:
    """The documents as finetuner stores them: the id where it is learned, ~id where not."""
    stream = torch.cat([torch.where(labels < 0, ~tokens, tokens) for tokens, labels in made]).numpy().astype(np.int32)
    lengths = np.array([len(tokens) for tokens, _ in made], np.int64)
    stops = np.cumsum(lengths)
    learned = np.array([int((labels[1:] >= 0).sum()) for _, labels in made], np.int32)
    whole = np.ones(len(made), np.bool_)
    numbers = np.arange(len(made), dtype=np.int64)
    return Samples((stream,), stops - lengths, stops, learned, numbers, whole, LENGTH, packed, {})


class Ours:
    """The engine with a small Llama and its rows; `one_pass` takes each document once."""

    def __init__(
        self, folder: Path, sizes: Sizes, *, packed: bool = True, attention: Any = "auto", dtype: Any = "float32"
    ) -> None:
        config = {**CONFIG, "hidden_size": sizes.hidden, "intermediate_size": sizes.hidden * 3}
        source = Fresh(config, str(folder / "tokenizer"))
        model = CausalLM(source, dtype=dtype, checkpointing=False, attention=attention)
        samples = samples_of(documents(sizes), packed=packed)
        packs = pack_samples(samples, seed=0)
        together = 1 if packed else sizes.documents // 6
        plan = Plan(packs, together, Steps(-(-len(packs) // together)), 0)
        self.feed = Feed(samples, plan, 0, 1, 1)
        self.learner = build(model, CPU, dialogues=False).learner
        self.engine = TorchEngine(self.learner, AdamW(lr=1e-4), CPU)

    def one_pass(self) -> None:
        for step in range(self.feed.steps):
            learned = self.feed.learned(step)
            batches = self.feed.batches(step)
            losses = [self.engine.accumulate(batch, learned, last=True).double() for batch in batches]
            self.engine.step(step, 1.0, torch.stack(losses).sum() / learned)


class Padded:
    """transformers' model over padded batches of eight with its own loss over all places; `grouped` by length."""

    def __init__(self, folder: Path, sizes: Sizes, *, grouped: bool) -> None:
        own = Ours(folder, sizes)
        self.model = own.learner.causal
        self.model.set_attn_implementation("sdpa")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        made = documents(sizes)
        made = sorted(made, key=lambda pair: len(pair[0])) if grouped else made
        self.batches = [self.padded(made[start : start + 8]) for start in range(0, len(made), 8)]

    @staticmethod
    def padded(made: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        tokens = pad([tokens for tokens, _ in made], batch_first=True)
        labels = pad([labels for _, labels in made], batch_first=True, padding_value=-100)
        mask = pad([torch.ones(len(tokens), dtype=torch.long) for tokens, _ in made], batch_first=True)
        return {"input_ids": tokens, "labels": labels, "attention_mask": mask}

    def one_pass(self) -> None:
        for batch in self.batches:
            self.model(**batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def step_rows(folder: Path, sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Tokens a second of ours over each other way: the same documents, so times of one pass."""
    ours = Ours(folder, sizes)
    padded = Padded(folder, sizes, grouped=False)
    yield Row("tokens/s, ours / padded batches of 8, whole logits", ratios(rounds, padded.one_pass, ours.one_pass), 4.5)
    grouped = Padded(folder, sizes, grouped=True)
    yield Row("tokens/s, ours / grouped by length, whole logits", ratios(rounds, grouped.one_pass, ours.one_pass), 1.8)
    masked = Ours(folder, sizes, attention="sdpa")
    yield Row("tokens/s, ours / a mask of all places, same loss", ratios(rounds, masked.one_pass, ours.one_pass), 1.25)
    single = Ours(folder, sizes, packed=False)
    yield Row("tokens/s, ours / one document a row, same loss", ratios(rounds, single.one_pass, ours.one_pass), 1.0)
    half = Ours(folder, sizes, dtype="bfloat16")
    yield Row("tokens/s, bfloat16 / float32 (depends on the CPU)", ratios(rounds, ours.one_pass, half.one_pass))


def exact_rows(folder: Path, sizes: Sizes, rounds: int) -> Iterator[Row]:
    """The packed gradient against that of single documents."""
    for attention in ("auto", "sdpa"):
        gradients = []
        for packed in (True, False):
            ours = Ours(folder, sizes, packed=packed, attention=attention)
            for step in range(ours.feed.steps):
                for batch in ours.feed.batches(step):
                    ours.engine.accumulate(batch, 1, last=True)
            gradients.append(torch.cat([p.grad.flatten() for _, p in ours.learner.trainable() if p.grad is not None]))
        apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        yield Row(f"gradient, packed against apart ({attention})", (apart,), most=1e-5, unit="")


# --- the head ----------------------------------------------------------------------------------------------------


def peak_of(work: Callable[[], Any]) -> float:
    """MiB that the resident memory of this process rises by at most while it works."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def head_rows(folder: Path, sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Head and loss alone: 40 % of the places learned, the head trained."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
    hidden = torch.randn(1, sizes.places, sizes.hidden, requires_grad=True)
    labels = torch.randint(sizes.vocabulary, (1, sizes.places))
    labels[0, : int(sizes.places * 0.6)] = -100
    targets = F.pad(labels[0, 1:], (0, 1), value=-100)
    places = (targets >= 0).nonzero()[:, 0]

    def ours() -> None:
        loss_sum(head, hidden[0, places], targets[places], torch.float32).backward()
        hidden.grad = head.weight.grad = None

    def whole() -> None:
        ForCausalLMLoss(head(hidden), labels, sizes.vocabulary).backward()
        hidden.grad = head.weight.grad = None

    yield Row("head and loss, time of ours / transformers'", ratios(rounds, ours, whole), most=0.55)
    peaks = tuple(peak_of(ours) / peak_of(whole) for _ in range(rounds))
    yield Row("head and loss, extra peak of ours / transformers'", peaks, most=0.30)


# --- data --------------------------------------------------------------------------------------------------------


def chats(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """(tokenizer, rows): conversations of prose, with a tokenizer trained on it."""
    from tokenise import make_rows, make_tokenizer, prose

    lines = prose()
    make_tokenizer(folder / "chat", lines)
    make_rows(folder / "chats.jsonl", sizes.rows, lines)
    return folder / "chat", folder / "chats.jsonl"


def passes(tokenizer: Any, file: Path) -> int:
    """As XTuner 0.2 prepares data: a pass each to map rows, apply the template, tokenise by segment, filter, pack."""
    import datasets

    datasets.disable_progress_bars()

    def turns(row: dict[str, Any]) -> dict[str, Any]:
        said = [message["content"] for message in row["messages"]]
        return {"conversation": [{"input": a, "output": b} for a, b in zip(said[::2], said[1::2])]}

    def templated(row: dict[str, Any]) -> dict[str, Any]:
        begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        made = [{"input": begin + t["input"] + end, "output": t["output"] + "<|im_end|>"} for t in row["conversation"]]
        return {"conversation": made}

    def tokenised(row: dict[str, Any]) -> dict[str, Any]:
        ids: list[int] = []
        labels: list[int] = []
        for turn in row["conversation"]:
            asked = tokenizer.encode(turn["input"], add_special_tokens=False)
            said = tokenizer.encode(turn["output"], add_special_tokens=False)
            ids += asked + said
            labels += [-100] * len(asked) + said
        return {"input_ids": ids[:LENGTH], "labels": labels[:LENGTH]}

    def packed(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {name: [x for row in rows[name] for x in row] for name in ("input_ids", "labels")}
        count = len(joined["input_ids"]) // LENGTH * LENGTH
        return {name: [v[i : i + LENGTH] for i in range(0, count, LENGTH)] for name, v in joined.items()}

    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        table = table.map(turns, remove_columns=table.column_names)
        table = table.map(templated)
        table = table.filter(lambda row: len(row["conversation"]) > 0)
        table = table.map(tokenised, remove_columns=table.column_names)
        table = table.filter(lambda row: any(label >= 0 for label in row["labels"]))
        return len(table.map(packed, batched=True))


def data_rows(folder: Path, sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Tokenising, packing and reading, each on one thread."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    place, file = chats(folder, sizes)
    peer, plain = AutoTokenizer.from_pretrained(place), Tokenizer.from_file(str(place / "tokenizer.json"))
    template = (place / "chat_template.jinja").read_text()
    spec = EncoderSpec((place / "tokenizer.json").read_text(), template, special=(("eos_token", "<|im_end|>"),))
    data = Dialogues(Json(str(file)), rows=openai, length=LENGTH, too_long="truncate")
    texts = [peer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in file.open()]

    def ours() -> Samples:
        with tempfile.TemporaryDirectory() as cache:
            samples = prepare(data, spec, cache=Path(cache), workers=0)
            pack_samples(samples, seed=0)
            return samples

    def floor() -> None:
        for start in range(0, len(texts), 512):
            plain.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)

    yield Row("rows/s, ours / passes as XTuner 0.2 has them", ratios(rounds, lambda: passes(peer, file), ours), 2.0)
    yield Row("time, rows to packs / encode_batch_fast alone", ratios(rounds, ours, floor), most=1.7)

    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, sizes.packed), 8, LENGTH).astype(np.int32)
    _, bounds = pack(lengths, LENGTH)
    fill = lengths.sum() / (len(bounds) - 1) / LENGTH
    seconds = tuple(clocked(lambda: pack(lengths, LENGTH)) for _ in range(rounds))
    yield Row(f"packing {sizes.packed:,} documents, seconds", seconds, most=0.3, unit="s")
    yield Row(f"packing {sizes.packed:,} documents, fill", (float(fill),), least=0.995, unit="")

    ready = Ours(folder, sizes)
    tokens = sum(int(ready.feed.lengths(step).sum()) for step in range(ready.feed.steps))
    reads = [
        clocked(lambda: [ready.feed.batches(step) for step in range(ready.feed.steps)]) for _ in range(20 * rounds)
    ]
    micros = tuple(1e6 * seconds * LENGTH / tokens for seconds in reads[rounds:])
    yield Row("a packed row of 2,048 tokens is read in", micros, most=40, unit="us")


# --- start -------------------------------------------------------------------------------------------------------

ABSENT = ("torch", "transformers", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy")


def start_rows(folder: Path, sizes: Sizes, rounds: int) -> Iterator[Row]:
    """The command line beside `import torch`: processor time of whole processes."""

    def process(*words: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *words], capture_output=True, check=True)

    def seconds(work: Callable[[], Any]) -> float:
        before = os.times()
        work()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    helps, torchs = process("-m", "finetuner", "--help"), process("-c", "import torch")
    values = tuple(seconds(helps) / seconds(torchs) for _ in range(rounds + 1))
    yield Row("`finetuner --help` / `import torch`", values[1:], most=0.3)
    code = f"import finetuner.cli.main as m, sys; m.main(['--help']); sys.exit(any(n in sys.modules for n in {ABSENT}))"
    yield Row("heavy packages that `--help` imports", (float(subprocess.run([sys.executable, "-c", code],
              capture_output=True).returncode),), most=0, unit="")  # fmt: skip


SECTIONS = {"exact": exact_rows, "step": step_rows, "head": head_rows, "data": data_rows, "start": start_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    if options.quick:
        Row.slack = 0.6
    print(f"torch {torch.__version__}, 1 thread, {options.rounds} rounds\n{'':<58}{'min':>9}{'median':>9}{'max':>9}")
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name) / "tokenizer", sizes.vocabulary)
        for section, rows in SECTIONS.items():
            if options.only in (None, section):
                for row in rows(Path(name), sizes, options.rounds):
                    print(row, flush=True)
                    missed += not row.holds
    return int(options.check and missed > 0)


if __name__ == "__main__":
    sys.exit(main())
