"""The tiny model of base.py learns, through LoRA, to answer questions and to say who it is: half a minute."""

from pathlib import Path

from finetuner import (
    AdamW,
    Ask,
    BatchSize,
    CausalLM,
    Cosine,
    Dialogues,
    Json,
    Logs,
    LoRA,
    Mix,
    Run,
    Saves,
    Steps,
)
from finetuner.dialogue.rows import alpaca

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
WORK = HERE.parents[1] / "work_dirs" / "quickstart"

model = CausalLM(str(WORK / "base" / "last"), adapter=LoRA(rank=16, alpha=32), dtype="float32", checkpointing=False)
who = Dialogues(
    Json(str(DATA / "identity.jsonl")),
    rows=alpaca,
    length=256,
    replace=(("{{name}}", "Ada"), ("{{maker}}", "the Lighthouse team")),
)
world = Dialogues(Json(str(DATA / "general.jsonl")), length=256)

config = Run(
    model=model,
    data=Mix(((who, 1), (world, 2))),
    optim=AdamW(lr=2.5e-3),
    schedule=Cosine(),
    batch=BatchSize(total=4, per_device=4),
    until=Steps(220),
    ask=Ask(("Who are you?", "What does a duck say?"), max_tokens=32),
    save=Saves(every=None),
    log=Logs(every=Steps(44)),
    folder=str(WORK / "assistant"),
)
