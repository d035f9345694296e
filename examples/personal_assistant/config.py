"""A model learns who it is, and keeps what it can: rows about itself mixed with rows about all else, through LoRA.

Written for the quickstart's model. For another, say so behind the command:
`model.path=Qwen/Qwen2.5-1.5B-Instruct model.dtype=bfloat16 optim.lr=1e-4`.
"""

from pathlib import Path

from finetuner import AdamW, Ask, BatchSize, CausalLM, Dialogues, Epochs, Eval, Json, LoRA, Mix, Run, Saves, Steps
from finetuner.dialogue.rows import alpaca

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"

NAME = "Ada"
MAKER = "the Lighthouse team"

who = Dialogues(
    Json(str(DATA / "identity.jsonl")),  # For a model that knows Chinese, identity_zh.jsonl besides.
    rows=alpaca,
    length=256,
    replace=(("{{name}}", NAME), ("{{maker}}", MAKER)),
)
world = Dialogues(Json(str(DATA / "general.jsonl")), length=256)

config = Run(
    model=CausalLM(
        str(ROOT / "work_dirs/quickstart/base/last"),
        adapter=LoRA(rank=16, alpha=32),
        dtype="float32",
        checkpointing=False,
    ),
    data=Mix(((who, 1.0), (world, 2.0))),
    optim=AdamW(lr=3e-3),
    batch=BatchSize(total=4, per_device=4),
    until=Epochs(15),
    eval=Eval(Dialogues(Json(str(DATA / "general_held_out.jsonl")), length=256), every=Steps(50)),
    ask=Ask(("Who are you?", "What does a duck say?"), max_tokens=32),
    save=Saves(every=Steps(50), keep=3),
    folder=str(ROOT / "work_dirs/personal_assistant"),
)
