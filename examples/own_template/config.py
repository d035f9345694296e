"""A chat template of our own, valley.jinja, learned by the quickstart's model through LoRA."""

from pathlib import Path

from finetuner import AdamW, Ask, BatchSize, CausalLM, Dialogues, Epochs, Json, LoRA, Run, Saves

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

config = Run(
    model=CausalLM(
        str(ROOT / "work_dirs/quickstart/base/last"),
        adapter=LoRA(rank=16),
        template=str(HERE / "valley.jinja"),
        dtype="float32",
        checkpointing=False,
    ),
    data=Dialogues(Json(str(ROOT / "examples/data/general.jsonl")), length=256),
    optim=AdamW(lr=2.5e-3),
    batch=BatchSize(total=4, per_device=4),
    until=Epochs(20),
    ask=Ask(("What does a duck say?", "Where does Mira live?"), max_tokens=32),
    save=Saves(every=None),
    folder=str(ROOT / "work_dirs/own_template"),
)
