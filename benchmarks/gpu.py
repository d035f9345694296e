"""On one GPU: what training reaches of it, set against the product of matrices that it does at best.

    python benchmarks/gpu.py [--only WORD ...] [--folder DIR] [--json FILE] [--toy]

- First the roof: products of the shapes that an 8B model has. Then the checks that everything else leans on (attention
  kernel against the loop, head piece sizes), then training runs of random Llama-shaped models, each in a process of its
  own: 8B LoRA and QLoRA, 3B and 1B full, the checkpointing dial, compiled layers, Liger, 8-bit moments; TRL beside,
  where it can be imported.
- Rows of 8,192 tokens of documents with a lognormal length of about 1,000 on average, 40 % of the places learned.
- MFU counts useful operations (`finetuner/model/work.py`) over the maker's figure, "of roof" over the measured product.
- `--toy` takes tiny models, on a CPU too: what needs CUDA is told and left out. It shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy import write_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A Llama, and the tokens of its rows."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    size: int
    vocabulary: int
    tied: bool
    row: int = 8192
    document: int = 1000


SHAPES = {
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
    "3B": Shape(3072, 8192, 28, 24, 8, 128, 128256, True),
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 128256, True, row=16384),
}
TOY = Shape(64, 128, 2, 4, 2, 16, 400, False, row=256, document=40)


@dataclass(frozen=True)
class Case:
    """One training run: fields of `CausalLM` and `AdamW` beside the model's path."""

    name: str
    shape: str
    adapter: bool = False
    quant: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    row: int | None = None
    cuda: bool = False
    """Only there."""


CASES = (
    Case("8B LoRA, no checkpointing", "8B", adapter=True, model={"checkpointing": False}),
    Case("8B LoRA, auto", "8B", adapter=True, model={"checkpointing": "auto"}),
    Case("8B LoRA, half of the layers", "8B", adapter=True, model={"checkpointing": 16}),
    Case("8B LoRA, all layers", "8B", adapter=True, model={"checkpointing": True}),
    Case("8B LoRA, none, compiled", "8B", adapter=True, model={"checkpointing": False, "compile": True}, cuda=True),
    Case("8B LoRA, all, compiled", "8B", adapter=True, model={"checkpointing": True, "compile": True}, cuda=True),
    Case("8B LoRA, none, Liger", "8B", adapter=True, model={"checkpointing": False, "kernels": "liger"}, cuda=True),
    Case(
        "8B LoRA, all, offloaded, 32k", "8B", True, model={"checkpointing": True, "offload": True}, row=32768, cuda=True
    ),
    Case("8B QLoRA, all layers, 2k", "8B", adapter=True, quant=True, model={"checkpointing": True}, row=2048),
    Case("8B QLoRA, all layers, 8k", "8B", adapter=True, quant=True, model={"checkpointing": True}),
    Case("8B QLoRA, no checkpointing", "8B", adapter=True, quant=True, model={"checkpointing": False}),
    Case("1B full, no checkpointing", "1B", model={"checkpointing": False}),
    Case("1B full, compiled", "1B", model={"checkpointing": False, "compile": True}, cuda=True),
    Case("3B full, all layers", "3B", model={"checkpointing": True}),
    Case("3B full, all, 8-bit moments", "3B", model={"checkpointing": True}, optim={"bits": 8}, cuda=True),
)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], rounds: int = 5) -> float:
    """The quickest of a few rounds, after one to warm up."""
    best = float("inf")
    for _ in range(rounds + 1):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - begin) if _ else best
    return best


# --- the roof and the checks -------------------------------------------------------------------------------------


def roof(shape: Shape) -> Iterator[dict[str, Any]]:
    """Products of a row with the matrices of a layer."""
    for inner, outer in ((shape.hidden, shape.hidden), (shape.hidden, shape.inner), (shape.inner, shape.hidden)):
        one, other = (torch.randn(size, device=DEVICE, dtype=HALF) for size in ((shape.row, inner), (inner, outer)))
        seconds = timed(lambda one=one, other=other: one @ other, 20)
        rate = 2 * shape.row * inner * outer / seconds / 1e12
        yield {"name": f"product {shape.row} x {inner} x {outer}", "tflops": round(rate, 2)}


def attention(shape: Shape) -> Iterator[dict[str, Any]]:
    """The registered attention of a packed row against one causal SDPA a document in float32, and its time."""
    import torch.nn.functional as F

    from finetuner.data.batch import IGNORED  # noqa: F401 - finetuner is installed
    from finetuner.model.attention import NAME, arguments
    from finetuner.model.documents_apart import documents_apart

    for heads, groups, size in ((shape.heads, shape.groups, shape.size), (shape.heads, shape.heads, shape.size // 2)):
        torch.manual_seed(0)
        lengths = documents(shape, shape.row)
        q, k, v = (
            torch.randn(1, count, shape.row, size, device=DEVICE, dtype=HALF, requires_grad=True)
            for count in (heads, groups, groups)
        )
        given = arguments(NAME, tuple(lengths), DEVICE)
        module = torch.nn.Module()

        def both(q: Any = q, k: Any = k, v: Any = v, given: Any = given, module: Any = module) -> tuple[Any, Any]:
            out, _ = documents_apart(module, q, k, v, None, scaling=q.shape[-1] ** -0.5, **given)
            grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
            return out, grads

        out, grads = both()
        parts = [tensor.detach().float().split(lengths, 2) for tensor in (q, k, v)]
        leaves = [[part.clone().requires_grad_() for part in tensor] for tensor in parts]
        slow = [F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in zip(*leaves)]
        torch.cat(slow, 2).square().sum().backward()
        wanted = [torch.cat([leaf.grad for leaf in tensor], 2) for tensor in leaves]
        apart = max(float((g.float() - w).norm() / w.norm()) for g, w in zip(grads, wanted))
        forward = float((out.float() - torch.cat(slow, 2).transpose(1, 2)).norm() / out.float().norm())
        name = f"packed attention, {heads} heads over {groups} of {size}"
        yield {"name": name, "ms": round(1e3 * timed(both), 3), "error": round(max(apart, forward), 5)}


def head(shape: Shape) -> Iterator[dict[str, Any]]:
    """Head and loss of a row's learned places, by the size of a piece; and whole logits beside it."""
    from finetuner.model import head as module

    places = int(shape.row * 0.4)
    weight = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=DEVICE, dtype=HALF).requires_grad_(
        False
    )
    hidden = torch.randn(places, shape.hidden, device=DEVICE, dtype=HALF, requires_grad=True)
    targets = torch.randint(shape.vocabulary, (places,), device=DEVICE)
    kept = module.rows
    for size in (256, 512, 1024, 2048, 4096):
        module.rows = lambda vocabulary, size=size: size  # type: ignore[assignment]
        seconds = timed(lambda: module.loss_sum(weight, hidden, targets, HALF).backward())
        yield {"name": f"head, pieces of {size}", "ms": round(1e3 * seconds, 2)}
    module.rows = kept
    seconds = timed(lambda: module.loss_sum(weight, hidden, targets, HALF).backward())
    yield {"name": f"head, own choice of {kept(shape.vocabulary)}", "ms": round(1e3 * seconds, 2)}


def documents(shape: Shape, row: int) -> list[int]:
    """Lengths that fill a row."""
    draw, lengths = np.random.default_rng(0), []
    while sum(lengths) < row:
        lengths.append(min(max(8, int(draw.lognormal(np.log(shape.document * 0.7), 0.8))), row - sum(lengths)))
    return lengths


# --- training ----------------------------------------------------------------------------------------------------


def write_model(shape: Shape, folder: Path) -> Path:
    """A random model in bfloat16 with a tokenizer of its vocabulary's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    write_tokenizer(folder, shape.vocabulary)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=shape.size, tie_word_embeddings=shape.tied, max_position_embeddings=131072, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(HALF)
    with DEVICE:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    gc.collect()
    return folder


def samples_of(shape: Shape, row: int, count: int) -> Any:
    """`count` rows of documents as finetuner stores them."""
    from finetuner.data.samples import Samples

    lengths = np.array(documents(shape, row) * count, np.int64)
    draw = np.random.default_rng(1)
    tokens = draw.integers(3, shape.vocabulary, lengths.sum()).astype(np.int32)
    stops = np.cumsum(lengths)
    within = np.arange(lengths.sum()) - np.repeat(stops - lengths, lengths)
    stream = np.where(within < np.repeat((lengths * 0.6).astype(np.int64), lengths), ~tokens, tokens)
    learned = np.array([(part >= 0).sum() for part in np.split(stream, stops[:-1])], np.int32)
    learned -= np.array([int(stream[start] >= 0) for start in stops - lengths], np.int32)
    numbers, whole = np.arange(len(lengths), dtype=np.int64), np.ones(len(lengths), np.bool_)
    return Samples((stream,), stops - lengths, stops, learned, numbers, whole, row, True, {})


def train(case: Case, shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """Tokens a second, MFU and peak memory of a run's steps, through finetuner's own engine."""
    from finetuner import NF4, AdamW, CausalLM, LoRA, Steps
    from finetuner.data.ahead import Ahead
    from finetuner.data.feed import Feed
    from finetuner.data.packs import pack_samples
    from finetuner.data.steps import Plan
    from finetuner.engine.speed import speed_of
    from finetuner.engine.torch_engine import TorchEngine
    from finetuner.model.build import build
    from finetuner.model.work import work_of
    from finetuner.train.loop import gathered
    from finetuner.train.use import peak_memory

    row = case.row if case.row is not None and shape is not TOY else shape.row
    began = time.perf_counter()
    source = CausalLM(
        str(folder), adapter=LoRA(rank=16) if case.adapter else None, quant=NF4() if case.quant else None, **case.model
    )
    learner = build(source, DEVICE, dialogues=False, tokens=row).learner
    engine = TorchEngine(learner, AdamW(lr=1e-4, **case.optim), DEVICE)
    loaded = time.perf_counter() - began
    samples = samples_of(shape, row, steps + 3)
    feed = Feed(samples, Plan(pack_samples(samples, seed=0), 1, Steps(steps + 2), 0), 0, 1, 1)
    work, speed = work_of(learner.model, learner.causal), speed_of(DEVICE, HALF)
    done, operations, losses = 0, 0.0, []
    with Ahead(feed, pinned=DEVICE.type == "cuda") as ahead:
        for step in range(steps + 2):
            if step == 2:
                wait()
                first = time.perf_counter() - began
                begin = time.perf_counter()
            batches, learned = ahead.batches(step), feed.learned(step)
            loss = gathered(engine, batches, learned, 0, step) / learned
            engine.step(step, 1.0, loss)
            losses.append(loss)
            if step >= 2:
                done += int(feed.lengths(step).sum())
                operations += work.of(feed.lengths(step), learned)
        wait()
    seconds = time.perf_counter() - begin
    return {
        "name": case.name, "tokens_per_second": round(done / seconds, 1),
        "mfu": round(operations / seconds / speed.operations, 4), "tflops": round(operations / seconds / 1e12, 3),
        "peak_gib": round(peak_memory() / 2**30, 2), "load_s": round(loaded, 1), "two_steps_s": round(first, 1),
        "loss": round(float(losses[-1]), 4),
    }  # fmt: skip


def beside(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """8B LoRA through TRL's SFTTrainer: bf16, packing, no checkpointing."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wait()
            ends.append(time.perf_counter())

    lengths = documents(shape, shape.row) * (steps + 4)
    draw = np.random.default_rng(1)
    rows = [{"input_ids": draw.integers(3, shape.vocabulary, length).tolist()} for length in lengths]
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps + 2, per_device_train_batch_size=1, learning_rate=1e-4,
        max_length=shape.row, packing=True, packing_strategy="bfd", padding_free=True, bf16=True, report_to=[],
        save_strategy="no", gradient_checkpointing=False, logging_steps=1000, use_cpu=DEVICE.type == "cpu",
    )  # fmt: skip
    options = {"attn_implementation": "flash_attention_2"} if DEVICE.type == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=HALF, **options)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[Ends()])
    trainer.train()
    rate = shape.row * steps / (ends[-1] - ends[-1 - steps])
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return {"name": "8B LoRA through TRL, packed", "tokens_per_second": round(rate, 1), "peak_gib": round(peak, 2)}


# --- all of it ---------------------------------------------------------------------------------------------------


def one(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of one part, in this process."""
    name, toy = options.one, options.toy
    steps = 2 if toy else 6
    if name in ("roof", "attention", "head"):
        shape = TOY if toy else SHAPES["8B"]
        return list({"roof": roof, "attention": attention, "head": head}[name](shape))
    case = next((case for case in CASES if case.name == name), None)
    size = "8B" if case is None else case.shape
    shape = TOY if toy else SHAPES[size]
    folder = write_model(shape, options.folder / ("toy" if toy else size))
    return [beside(shape, folder, steps) if case is None else train(case, shape, folder, steps)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts whose name holds one of these words")
    parser.add_argument("--folder", type=Path, help="where the random models are written (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="where the figures are added, a line each")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(one(options)))
        return 0
    kind = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{kind}, torch {torch.__version__}{', toy sizes' if options.toy else ''}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        parts = [("roof", False), ("attention", False), ("head", False)]
        parts += [(case.name, case.cuda) for case in CASES] + [("8B LoRA through TRL", False)]
        for name, cuda in parts:
            if options.only and not any(word in name for word in options.only):
                continue
            if cuda and DEVICE.type != "cuda":
                print(f"{name}: left out, it needs CUDA", flush=True)
                continue
            failed += not told(name, folder, options)
    return failed


def told(name: str, folder: Path, options: argparse.Namespace) -> bool:
    """Runs one part in a process of its own and prints what came of it; whether it ran."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), *["--toy"] * options.toy]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        missing = "No module named 'trl'" in reason
        print(f"{name}: left out, {'TRL is not installed' if missing else reason}", flush=True)
        return missing
    for result in json.loads(done.stdout.splitlines()[-1]):
        figures = "  ".join(f"{key} {value:,}" for key, value in result.items() if key != "name")
        print(f"{result['name']:<44} {figures}", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
