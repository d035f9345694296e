"""What a config file may say. Importing this imports neither torch nor transformers."""

from finetuner.config.data import Csv, Dialogues, Documents, Hub, Json, Mix, Parquet, Skip, Text
from finetuner.config.model import NF4, CausalLM, Fresh, LoRA
from finetuner.config.run import (
    FSDP,
    WSD,
    AdamW,
    Ask,
    BatchSize,
    Constant,
    Cosine,
    Epochs,
    Eval,
    Linear,
    Logs,
    Run,
    Saves,
    Steps,
    Torch,
    ZeRO,
)

__version__ = "0.1.0"

__all__ = [
    "FSDP",
    "NF4",
    "WSD",
    "AdamW",
    "Ask",
    "BatchSize",
    "CausalLM",
    "Constant",
    "Cosine",
    "Csv",
    "Dialogues",
    "Documents",
    "Epochs",
    "Eval",
    "Fresh",
    "Hub",
    "Json",
    "Linear",
    "LoRA",
    "Logs",
    "Mix",
    "Parquet",
    "Run",
    "Saves",
    "Skip",
    "Steps",
    "Text",
    "Torch",
    "ZeRO",
]
