"""Rows of a shape of our own: the notes of a lost-property desk, learned by the quickstart's model through LoRA."""

from pathlib import Path

from finetuner import AdamW, Ask, BatchSize, CausalLM, Dialogues, Epochs, Json, LoRA, Run, Saves
from finetuner.dialogue.message import Dialogue, Message, Row, RowError

ROOT = Path(__file__).parents[2]
ROLES = {"visitor": "user", "clerk": "assistant"}


def desk(row: Row) -> Dialogue:
    """{"visitor": {"name": ..., "job": ...}, "talk": [{"by": ..., "says": ...}, ...]} -> a dialogue."""
    talk = row.get("talk")
    if not talk:
        raise RowError("empty", "the note holds no talk", fits='"talk": [{"by": "visitor", "says": "..."}, ...]')
    for line in talk:
        if line["by"] not in ROLES:
            raise RowError("role", "nobody of this name speaks at the desk", found=line["by"], fits=", ".join(ROLES))
    return Dialogue(tuple(Message(ROLES[line["by"]], line["says"]) for line in talk))


config = Run(
    model=CausalLM(
        str(ROOT / "work_dirs/quickstart/base/last"), adapter=LoRA(rank=16), dtype="float32", checkpointing=False
    ),
    data=Dialogues(Json(str(ROOT / "examples/data/desk.jsonl")), rows=desk, length=256),
    optim=AdamW(lr=5e-3),
    batch=BatchSize(total=4, per_device=4),
    until=Epochs(20),
    ask=Ask(("I lost my hat.",), max_tokens=32),
    save=Saves(every=None),
    folder=str(ROOT / "work_dirs/own_dataset"),
)
