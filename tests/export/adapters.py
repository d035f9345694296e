"""Adapters made by peft on the spot, and ways to harm them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = [5, 20, 30, 7, 99, 6, 41, 300]


def adapter(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> torch.Tensor:
    """Writes an adapter whose every trained number is random; gives the logits of peft's own model for `IDS`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = {"target_modules": LINEAR, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits: torch.Tensor = adapted.eval()(input_ids=torch.tensor([IDS])).logits[0].float()
    return logits


def edit(file: Path, **values: Any) -> None:
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | values))


def retensor(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
