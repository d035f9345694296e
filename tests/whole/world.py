"""A small world to run whole journeys in: a tiny model, made rows and a config file in one folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import rig

ROOT = Path(__file__).parents[2]
NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo"]
CONFIG = '''"""A tiny run."""

from finetuner import *

config = Run(
    model=CausalLM("model", dtype="float32", checkpointing=False{model}),
    data={data},
    optim=AdamW(lr=1e-2, weight_decay=0.01),
    batch=BatchSize(total=4, per_device=2),
    until={until},
    save=Saves(every=Steps({every}), keep=2),
    log=Logs(every=Steps(1)),
    folder="out"{more},
)
'''
DIALOGUES = 'Dialogues(Json("rows.jsonl"), length=96, pack={pack})'
DOCUMENTS = 'Documents(Text("text.txt"), length=96)'
LORA = ", adapter=LoRA(rank=4, alpha=8, dropout=0.1)"
QLORA = ", adapter=LoRA(rank=4, alpha=8, dropout=0.1), quant=NF4()"


def rows(count: int = 37, seed: int = 0) -> list[dict[str, object]]:
    """Made conversations of one to three turns."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": f"who is {draw.choice(NAMES)}? {{{number}}}"})
            messages.append({"role": "assistant", "content": f"a friend {draw.randint(0, 99)} of {draw.choice(NAMES)}"})
        made.append({"messages": messages[: 2 if number % 3 else 4]})
    return made


def make(
    folder: Path,
    *,
    model: str = LORA,
    data: str = "",
    pack: bool = True,
    until: str = "Epochs(2)",
    every: int = 2,
    more: str = "",
    count: int = 37,
    **llama: object,
) -> Path:
    """Writes model, rows, text and config into `folder`; returns the config's path. Its paths are relative to there."""
    rig.tiny_llama(folder / "model", **{"attention_dropout": 0.1, **llama})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    (folder / "text.txt").write_text(
        "".join(f"{' '.join(NAMES[: n % 6 + 1])} walk {n} miles.\n" for n in range(count * 2))
    )
    text = CONFIG.format(model=model, data=data or DIALOGUES.format(pack=pack), until=until, every=every, more=more)
    (folder / "config.py").write_text(text)
    return folder / "config.py"


def environment(**extra: str) -> dict[str, str]:
    """What a child process sees: offline, one thread, the checkout."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT), **extra}


def finetuner(*args: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line and gives what it said."""
    command = [sys.executable, "-m", "finetuner", *map(str, args)]
    return subprocess.run(command, env=env or environment(), cwd=cwd, capture_output=True, text=True, timeout=300)


def losses(folder: Path) -> list[tuple[int, str, str, float]]:
    """(step, loss, norm, rate) of each logged step, the floats as hex: equal only if bit-equal."""
    told = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            told.append((record["step"], record["loss"].hex(), record["grad_norm"].hex(), record["learning_rate"]))
    return told


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor under the newest checkpoint's state and root, as bytes by file and name."""
    from safetensors.numpy import load_file

    last = folder / "last"
    return {
        f"{file.relative_to(last)}:{name}": tensor.tobytes()
        for file in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
