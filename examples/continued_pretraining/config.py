"""The quickstart's model goes on reading: an island that its texts never spoke of, mixed with what it knows."""

from pathlib import Path

from finetuner import AdamW, BatchSize, CausalLM, Cosine, Documents, Epochs, Eval, Mix, Run, Saves, Steps, Text

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"

island = Documents(Text(str(DATA / "island.txt")), length=256)
valley = Documents(Text(str(DATA / "world.txt")), length=256)

config = Run(
    model=CausalLM(str(ROOT / "work_dirs/quickstart/base/last"), dtype="float32", checkpointing=False),
    data=Mix(((island, 2.0), (valley, 1.0))),
    eval=Eval(Documents(Text(str(DATA / "island_held_out.txt")), length=256), every=Steps(20)),
    optim=AdamW(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.1),
    schedule=Cosine(warmup=Steps(10), floor=0.1),
    batch=BatchSize(total=8, per_device=8),
    until=Epochs(5),
    save=Saves(every=None),
    folder=str(ROOT / "work_dirs/continued_pretraining"),
)
