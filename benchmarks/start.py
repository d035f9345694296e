"""How soon finetuner is there: the command line beside `import torch`, a second start, a resume far into a run.

    python benchmarks/start.py [--rounds 5] [--samples 1000000]

- `--help`, `show` and a config error are timed as whole processes, in turn with `python -c "import torch"`.
- A run over `--samples` documents is started twice and stopped after its first step, then resumed near its end: what is
  told is the seconds from the loaded model to the first step, as the run's own log gives them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toy import CONFIG, write_tokenizer

RUN = """
from finetuner import *

config = Run(
    model=CausalLM(Fresh({config}, "tokenizer"), dtype="float32", checkpointing=False),
    data=Dialogues(Json("rows.jsonl"), length=32, pack=False),
    optim=AdamW(lr=1e-4), batch=BatchSize(total=4, per_device=4), until=Epochs(1),
    save=Saves(every=None), log=Logs(every=Steps(1)), folder="out",
)
"""


def seconds(command: list[str], folder: Path) -> float:
    """Wall seconds of one process."""
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True)
    return time.perf_counter() - begin


def table(folder: Path, rounds: int) -> None:
    """Prints the start of each command over that of `import torch`."""
    own = [sys.executable, "-m", "finetuner"]
    peer = [sys.executable, "-c", "import torch"]
    kinds = {"--help": ["--help"], "show": ["show", "run.py"], "config error": ["train", "run.py", "optim.rl=1"]}
    print(f"{'':<16}{'min':>8}{'median':>8}{'max':>8}   over `import torch`")
    for name, words in kinds.items():
        ratios = [seconds(own + words, folder) / seconds(peer, folder) for _ in range(rounds + 1)][1:]
        print(f"{name:<16}{min(ratios):>8.2f}{statistics.median(ratios):>8.2f}{max(ratios):>8.2f}")


def started(folder: Path, *words: str) -> dict[str, float]:
    """Seconds of a run: from the command to the loaded model, and from there to the first step."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "finetuner", "train", "run.py", *words]
    begin, loaded, encoded = time.perf_counter(), 0.0, 0
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            now = time.perf_counter()
            encoded += line.startswith("encoded")
            if "parameters train" in line:
                loaded = now
            if line.startswith("step "):
                process.terminate()
                rest = process.stderr.read()
                assert loaded, line + rest
                return {"to the model": loaded - begin, "model to step": now - loaded, "encoded again": encoded}
        raise SystemExit(f"the run ended before its first step: exit code {process.wait()}")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        small = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        (folder / "run.py").write_text(RUN.format(config=small))
        table(folder, args.rounds)
        row = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]})
        (folder / "rows.jsonl").write_text((row + "\n") * args.samples)
        print(f"\n{args.samples:,} samples, seconds    to the model   model to step   rows encoded")
        tell("first start", started(folder))
        tell("second start", started(folder, "--resume", "never"))
        move_to(folder, args.samples * 9 // 10 // 4)
        tell("resumed at 90 %", started(folder))


def tell(name: str, figures: dict[str, float]) -> None:
    """Prints one line of the second table."""
    encoded = "yes" if figures["encoded again"] else "no"
    print(f"{name:<27}{figures['to the model']:>12.1f}{figures['model to step']:>16.2f}{encoded:>15}")


def move_to(folder: Path, step: int) -> None:
    """Lets the run's checkpoint stand at `step`, as if it had trained until there: its manifest is written anew."""
    from finetuner.engine import checkpoint
    from finetuner.runtime.commit import read_manifest

    last = (folder / "out" / "last").resolve()
    meta = read_manifest(last)["meta"]

    def fill(target: Path) -> None:
        subprocess.run(["cp", "-r", *map(str, last.iterdir()), str(target)], check=True)
        (target / "MANIFEST.json").unlink()

    checkpoint.write(folder / "out", step, fill, {key: value for key, value in meta.items() if key != "step"})


if __name__ == "__main__":
    main()
