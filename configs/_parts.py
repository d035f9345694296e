"""What the ready runs share: data sets of the hub, and three ways to train a model on them."""

from finetuner import NF4, AdamW, Ask, BatchSize, CausalLM, Cosine, Dialogues, Epochs, Hub, LoRA, Run, Skip
from finetuner.dialogue.rows import alpaca

ALPACA = Dialogues(
    Hub("tatsu-lab/alpaca"),
    rows=alpaca,
    length=2048,
    too_long="drop",
    on_bad_row=Skip(100),  # A few dozen of its 52,002 rows have no output.
)
CHATS = Dialogues(Hub("HuggingFaceH4/ultrachat_200k", split="train_sft"), length=4096, too_long="drop")
"""Conversations of several turns."""
THOUGHTS = Dialogues(Hub("open-r1/Mixture-of-Thoughts", subset="math"), length=8192, too_long="drop")
"""Problems with long thinking before the answer."""

ASK = Ask(("Please tell me five scenic spots in Shanghai.", "Why is the sky blue?"))


def full(path: str, data: Dialogues = ALPACA) -> Run:
    """Every weight of the model at `path` learns."""
    return Run(
        model=CausalLM(path),
        data=data,
        optim=AdamW(lr=1e-5, betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.03, floor=0.1),
        batch=BatchSize(total=16),
        until=Epochs(3),
        ask=ASK,
    )


def lora(path: str, data: Dialogues = ALPACA) -> Run:
    """Adapters of rank 16 beside frozen bfloat16 weights learn."""
    return Run(
        model=CausalLM(path, adapter=LoRA(rank=16, alpha=32)),
        data=data,
        optim=AdamW(lr=2e-4),
        batch=BatchSize(total=16),
        until=Epochs(3),
        ask=ASK,
    )


def qlora(path: str, data: Dialogues = ALPACA) -> Run:
    """Adapters of rank 64 beside frozen 4-bit weights learn (arXiv:2305.14314)."""
    return Run(
        model=CausalLM(path, adapter=LoRA(rank=64, alpha=16), quant=NF4()),
        data=data,
        optim=AdamW(lr=2e-4),
        batch=BatchSize(total=16),
        until=Epochs(3),
        ask=ASK,
    )
