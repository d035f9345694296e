"""What glibc's settings of `finetuner.runtime.allocator` are worth to a training step on a CPU.

    python benchmarks/allocator.py [--steps 6] [--rounds 5] [--threads 1]

Each figure is of a process of its own: a small Llama with 32,000 words takes `--steps` steps over the same packed rows;
the first does not count. With and without the settings take turns; a ratio is of the CPU seconds of two processes of
one round, which say what other work on the machine does not change. The losses must be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toy import CONFIG, write_tokenizer

KINDS = {
    "full, float32, 2048": {"dtype": "float32", "length": 2048},
    "full, bfloat16, 2048": {"dtype": "bfloat16", "length": 2048},
    "LoRA, bfloat16, 2048": {"dtype": "bfloat16", "length": 2048, "rank": 16},
    "full, float32, 256": {"dtype": "float32", "length": 256},
}


def child(folder: Path, kind: dict[str, object], steps: int, keep: bool) -> None:
    """Trains; prints CPU seconds of the steps but the first, the last loss and the peak of resident memory as JSON."""
    from finetuner.runtime.allocator import keep_freed

    assert not keep or keep_freed()
    import torch

    from finetuner import AdamW, CausalLM, LoRA
    from finetuner.data.batch import IGNORED, Batch
    from finetuner.engine.optim import build_optimizer, groups
    from finetuner.model.build import build

    adapter = LoRA(rank=kind["rank"]) if "rank" in kind else None
    model = CausalLM(str(folder), adapter=adapter, dtype=kind["dtype"], checkpointing=False)
    cpu, optim = torch.device("cpu"), AdamW(lr=1e-4)
    torch.manual_seed(0)
    learner = build(model, cpu, dialogues=True).learner
    optimizer = build_optimizer(groups(learner, learner.trainable(), optim), optim, cpu)
    parameters = [parameter for _, parameter in learner.trainable()]
    torch.manual_seed(0)
    seconds, length = [], kind["length"]
    for _ in range(steps):
        lengths = tuple(length * part // 16 for part in (7, 4, 3, 2))
        tokens_1T = torch.randint(10, 32_000, (1, length))
        targets_1T = torch.where(torch.rand(1, length) < 0.4, tokens_1T.roll(-1, 1), IGNORED)
        positions_1T = torch.cat([torch.arange(n) for n in lengths])[None]
        learned = int((targets_1T != IGNORED).sum())
        batch = Batch(tokens_1T, targets_1T, positions_1T, lengths, (), learned)
        begin = time.process_time()
        loss = learner(batch)
        (loss / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": sum(seconds[1:]), "loss": float(loss), "peak": peak}))


def write_model(folder: Path) -> None:
    """Writes a Llama of 32,000 words with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(0)
    values = {name: value for name, value in CONFIG.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**values, vocab_size=32_000)).save_pretrained(folder)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "KIND", "KEEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, kind, keep = args.child
        return child(Path(folder), KINDS[kind], args.steps, keep == "keep")
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        print(f"{args.rounds} rounds of {args.steps - 1} steps, {args.threads} threads; glibc's own over ours")
        print(f"{'':<22}{'min':>8}{'median':>8}{'max':>8}{'s, own':>10}{'s, ours':>10}{'MiB own':>10}{'MiB ours':>10}")
        for kind in KINDS:
            table_row(kind, Path(name), args)


def table_row(kind: str, folder: Path, args: argparse.Namespace) -> None:
    """Measures and prints one kind of training."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[dict[str, float]]] = {"own": [], "keep": []}
    for number in range(args.rounds):
        for keep in ("own", "keep") if number % 2 else ("keep", "own"):
            command = [sys.executable, __file__, "--steps", str(args.steps), "--child", str(folder), kind, keep]
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found[keep].append(json.loads(done.stdout))
    assert len({figures["loss"] for figures in found["own"] + found["keep"]}) == 1, "the settings change no number"
    ratios = [own["seconds"] / ours["seconds"] for own, ours in zip(found["own"], found["keep"], strict=True)]
    print(f"{kind:<22}{min(ratios):>8.2f}{statistics.median(ratios):>8.2f}{max(ratios):>8.2f}", end="")
    for field, digits in (("seconds", 2), ("peak", 0)):
        for keep in ("own", "keep"):
            print(f"{statistics.median(figures[field] for figures in found[keep]):>10.{digits}f}", end="")
    print(flush=True)


if __name__ == "__main__":
    main()
