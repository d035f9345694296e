"""The same small model, data and hyper-parameters through other trainers, each in its own environment, in one run.

    python benchmarks/peers.py --make DIR          makes the environments (once; pip must reach a package index)
    python benchmarks/peers.py --environments DIR [--rounds 3] [--only NAME]

- Training: every step takes all rows, so that the order does not matter and losses can be set side by side; fp32, one
  thread, no checkpointing, 8 rows (or ours: a row of 2,048 tokens) at once. A peer that is not installed is left out.
- tokens/s counts the rows' real tokens over the seconds of a step, the first left out; the time to the first step is of
  the whole command; memory is the process' peak.
- Encoding: rows/s from rows to ids and masks (XTuner: to packs), one process and thread, the time of the peer's own
  passes alone; ours includes reading the file, and packing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "peers"
ROWS, MANY, STEPS, PER_DEVICE = 32, 5000, 4, 8


@dataclass(frozen=True)
class Peer:
    """A trainer, the environment that it lives in, and the script that runs it there."""

    name: str
    environment: str
    script: str
    trains: bool = True


PEERS = (
    Peer("TRL SFTTrainer", "trl", "trl_sft.py"),
    Peer("transformers Trainer", "trl", "hf_trainer.py"),
    Peer("LLaMA-Factory", "llamafactory", "llama_factory.py"),
    Peer("XTuner 0.2 (data)", "xtuner", "xtuner_data.py", trains=False),
)
ALONE = {"llamafactory": "llamafactory==0.9.5", "xtuner": "xtuner==0.2.0"}
"""Installed without dependencies, after what its requirements file lists."""

RUN = """
from finetuner import *

config = Run(
    model=CausalLM("{model}", dtype="float32", checkpointing=False),
    data=Dialogues(Json("{rows}"), length=2048), optim=AdamW(lr=1e-3, weight_decay=0.0, clip=1.0),
    batch=BatchSize(total=1000, per_device=1), until=Steps({steps}), schedule=Constant(), log=Logs(every=Steps(1)),
    save=Saves(every=None), folder="{out}",
)
"""
ENCODE = """
import json, resource, sys, tempfile, time
from pathlib import Path
from finetuner.config.data import Dialogues, Json
from finetuner.config.model import CausalLM
from finetuner.data.packs import pack_samples
from finetuner.data.samples import prepare
from finetuner.model.tokenizer import encoder_spec, load_tokenizer
spec = encoder_spec(load_tokenizer(CausalLM(sys.argv[1])))
begin = time.time()
with tempfile.TemporaryDirectory() as cache:
    samples = prepare(Dialogues(Json(sys.argv[2]), length=2048), spec, cache=Path(cache), workers=0)
    pack_samples(samples, seed=0)
print(json.dumps({"encode_seconds": time.time() - begin, "tokens": samples.report["tokens_in"],
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


@dataclass
class Result:
    """What one process came to."""

    first: float
    """Seconds from the command to the end of the first step."""
    step: float
    losses: list[float]
    rss: float


def make(folder: Path) -> None:
    """Makes the environments."""
    for name in sorted({peer.environment for peer in PEERS}):
        place = folder / name
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(place / "bin" / "pip"), "install", "-q"]
        subprocess.run([*pip, "-r", str(HERE / f"{name}.txt")], check=True)
        if name in ALONE:
            subprocess.run([*pip, "--no-deps", ALONE[name]], check=True)


def world(folder: Path) -> dict[str, str]:
    """The model, its tokenizer and the rows; gives their places."""
    import torch
    from tokenise import make_rows, make_tokenizer, prose
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = prose()
    make_tokenizer(folder / "model", lines)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    places = {"model": str(folder / "model")}
    for name, count in (("few", ROWS), ("many", MANY)):
        make_rows(folder / f"{name}.jsonl", count, lines)
        places[name] = str(folder / f"{name}.jsonl")
    return places


def environment(folder: Path) -> dict[str, str]:
    """One thread, no network, caches of their own."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    return os.environ | quiet | one | {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "hf")}


def ask(peer: Peer, home: Path, folder: Path, places: dict[str, str], job: str) -> dict[str, Any] | None:
    """What the peer's script reports; None, with the reason, where it fails."""
    out = Path(tempfile.mkdtemp(dir=folder))
    rows = places["few" if job == "train" else "many"]
    given = {"job": job, "model": places["model"], "rows": rows, "out": str(out)}
    given |= {"steps": STEPS, "per_device": PER_DEVICE, "accumulate": ROWS // PER_DEVICE}
    (out / "task.json").write_text(json.dumps(given))
    command = [str(home / "bin" / "python"), str(HERE / peer.script), str(out / "task.json")]
    done = subprocess.run(command, env=environment(out), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"ends"')]
    shutil.rmtree(out)
    if done.returncode or not lines:
        print(f"{peer.name}: left out, {(done.stderr.strip().splitlines() or ['no report'])[-1]}")
        return None
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def trained(report: dict[str, Any], begin: float) -> Result:
    """A peer's report as a result."""
    ends = report["ends"]
    later = [after - before for before, after in itertools.pairwise(ends)]
    return Result(ends[0] - begin, statistics.median(later), report["losses"], report["rss"])


def ours(folder: Path, places: dict[str, str], rows: int) -> Result:
    """The same through `finetuner train`, all packs a step."""
    out = Path(tempfile.mkdtemp(dir=folder))
    text = RUN.format(model=places["model"], rows=places["few"], steps=STEPS, out=out / "run")
    (out / "run.py").write_text(text.replace("total=1000", f"total={rows}"))
    begin, ends = time.time(), []
    command = [sys.executable, "-m", "finetuner", "train", str(out / "run.py")]
    with subprocess.Popen(command, env=environment(out), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("step "):
                ends.append(time.time())
    if process.returncode:
        raise SystemExit("".join(told))
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    report = {"ends": ends, "losses": [one["loss"] for one in metrics], "rss": metrics[-1]["memory_gib"] * 1024}
    shutil.rmtree(out)
    return trained(report, begin)


def counted(places: dict[str, str]) -> tuple[int, int]:
    """Real tokens of the rows that are trained on, and how many packs they make."""
    from finetuner.config.data import Dialogues, Json
    from finetuner.config.model import CausalLM
    from finetuner.data.packs import pack_samples
    from finetuner.data.samples import prepare
    from finetuner.model.tokenizer import encoder_spec, load_tokenizer

    spec = encoder_spec(load_tokenizer(CausalLM(places["model"])))
    with tempfile.TemporaryDirectory() as cache:
        samples = prepare(Dialogues(Json(places["few"]), length=2048), spec, cache=Path(cache), workers=0)
        return int(samples.lengths.sum()), len(pack_samples(samples, seed=0))


def shown(values: list[float]) -> str:
    return f"{min(values):>8.2f}{statistics.median(values):>8.2f}{max(values):>8.2f}"


def table_of_training(peers: list[Peer], homes: Path, folder: Path, places: dict[str, str], rounds: int) -> None:
    """Prints rates, memory, first steps, losses; ratios are of one round."""
    tokens, packs = counted(places)
    results: dict[str, list[Result]] = {}
    for _ in range(rounds):
        results.setdefault("finetuner", []).append(ours(folder, places, packs))
        for peer in list(peers):
            begin = time.time()
            report = ask(peer, homes / peer.environment, folder, places, "train")
            if report is None:
                peers.remove(peer)
            else:
                results.setdefault(peer.name, []).append(trained(report, begin))
    own = results["finetuner"]
    print(f"\n{tokens:,} real tokens a step of {ROWS} rows; {packs} packed rows of ours")
    print(f"{'':<22}{'tokens/s':>9}  ours over it: min, median, max   first step s  peak MiB  losses")
    for name, found in results.items():
        ratios = shown([other.step / mine.step for other, mine in zip(found, own)])
        first, rss = (statistics.median(getattr(one, part) for one in found) for part in ("first", "rss"))
        rate = tokens / statistics.median(one.step for one in found)
        losses = " ".join(f"{loss:.4f}" for loss in found[0].losses[:STEPS])
        print(f"{name:<22}{rate:>9,.0f}  {ratios:>28}   {first:>12.1f}{rss:>10,.0f}  {losses}")


def table_of_encoding(peers: list[Peer], homes: Path, folder: Path, places: dict[str, str], rounds: int) -> None:
    """Prints rows a second."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        command = [sys.executable, "-c", ENCODE, places["model"], places["many"]]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=True)
        seconds.setdefault("finetuner", []).append(json.loads(done.stdout.splitlines()[-1])["encode_seconds"])
        for peer in list(peers):
            report = ask(peer, homes / peer.environment, folder, places, "encode")
            if report is None:
                peers.remove(peer)
            else:
                seconds.setdefault(peer.name, []).append(report["encode_seconds"])
    print(f"\n{MANY:,} rows to ids and masks\n{'':<22}{'rows/s':>9}  ours over it: min, median, max")
    for name, found in seconds.items():
        ratios = shown([other / mine for other, mine in zip(found, seconds["finetuner"])])
        print(f"{name:<22}{MANY / statistics.median(found):>9,.0f}  {ratios:>28}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR")
    parser.add_argument("--environments", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="peers whose name holds this word")
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    if options.environments is None:
        parser.error("--environments or --make")
    here = [p for p in PEERS if (options.environments / p.environment / "bin" / "python").exists()]
    print(f"left out, no environment: {', '.join(p.name for p in PEERS if p not in here) or 'none'}")
    chosen = [peer for peer in here if not options.only or options.only.lower() in peer.name.lower()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = world(folder)
        table_of_encoding(list(chosen), options.environments.resolve(), folder, places, options.rounds)
        trains = [peer for peer in chosen if peer.trains]
        table_of_training(trains, options.environments.resolve(), folder, places, options.rounds)


if __name__ == "__main__":
    main()
