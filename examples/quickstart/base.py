"""A Llama of two million weights learns to write from the texts of a tiny world: two CPU cores, about a minute."""

from pathlib import Path

from finetuner import AdamW, BatchSize, CausalLM, Cosine, Documents, Eval, Fresh, Logs, Run, Saves, Steps, Text

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
WORK = HERE.parents[1] / "work_dirs" / "quickstart"

llama = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

config = Run(
    model=CausalLM(
        Fresh(llama, tokenizer=str(WORK / "tokenizer")), template="chatml", dtype="float32", checkpointing=False
    ),
    data=Documents(Text(str(DATA / "world.txt")), length=256),
    eval=Eval(Documents(Text(str(DATA / "held_out.txt")), length=256), every=Steps(55)),
    optim=AdamW(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1),
    schedule=Cosine(warmup=Steps(20), floor=0.1),
    batch=BatchSize(total=8, per_device=8),
    until=Steps(220),
    save=Saves(every=None),
    log=Logs(every=Steps(20)),
    folder=str(WORK / "base"),
)
