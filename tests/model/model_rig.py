"""Rows, configs and the independent oracle of the model floor's tests; the oracle imports nothing of finetuner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rig
import torch
import torch.nn.functional as F

from finetuner.config.model import CausalLM
from finetuner.data.batch import IGNORED, Batch
from finetuner.model.build import build

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "phi3": {"sliding_window": None},
}


def folder_of(kind: str, folder: Path) -> Path:
    """A tiny model of the family, with the rig's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    rig.tokenizer(folder)
    # transformers reads some families' tokenizers by a class of their own, whatever tokenizer.json says.
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    values = {
        "vocab_size": len(AutoTokenizer.from_pretrained(folder)), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **values | FAMILIES[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def row(lengths: tuple[int, ...], *, learned: bool = True, seed: int = 0, other: int | None = None) -> Batch:
    """A packed row of random documents whose later halves are learned; document `other` has different tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(10, 300, (length,), generator=generator) for length in lengths]
    if other is not None:
        documents[other] = (documents[other] + 1 - 10) % 290 + 10
    targets = []
    for tokens in documents:
        aims = torch.cat([tokens[1:], torch.tensor([IGNORED])])
        aims[: len(tokens) // 2 if learned else len(tokens)] = IGNORED
        targets.append(aims)
    positions = torch.cat([torch.arange(length) for length in lengths])
    aims_T = torch.cat(targets)
    return Batch(torch.cat(documents)[None], aims_T[None], positions[None], lengths, tuple(range(len(lengths))),
                 int((aims_T != IGNORED).sum()))  # fmt: skip


def learner_of(folder: Path, **fields: Any) -> Any:
    """The learner of a config, in float32 unless it says otherwise."""
    return build(CausalLM(str(folder), **{"dtype": "float32"} | fields), CPU, dialogues=True).learner


def oracle(folder: Path, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, one document at a time, whole logits, by transformers' eager attention in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    total, start = 0.0, 0
    for length in batch.lengths:
        tokens_1L = batch.tokens_1T[:, start : start + length]
        targets_L = batch.targets_1T[0, start : start + length]
        loss = F.cross_entropy(
            model(tokens_1L, use_cache=False).logits[0], targets_L, ignore_index=-100, reduction="sum"
        )
        loss.backward()
        total, start = total + loss.item(), start + length
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of gradients."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp_min(1e-12)) for name in one)


def gradients(learner: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a learner."""
    loss = learner(batch)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in learner.trainable()}
