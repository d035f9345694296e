"""Config files written on the spot: `write(folder, {"run.py": text})`, and a small run that is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

GOOD = '''
"""A run."""
from finetuner import *
from finetuner.dialogue.rows import alpaca

model = CausalLM("base", adapter=LoRA(rank=64), quant=NF4())
config = Run(
    model=model,
    data=Dialogues(Json("a.json"), rows=alpaca),
    optim=AdamW(lr=2e-4),
    batch=BatchSize(16),
    until=Epochs(3),
)
'''


def write(folder: Path, texts: Mapping[str, str]) -> Path:
    """Writes the files and returns the first; no line of theirs moves but that the first, empty one goes."""
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).removeprefix("\n"), encoding="utf-8")
    return folder / next(iter(texts))
