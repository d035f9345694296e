"""InternLM2 and 2.5 checkpoints as the Llama models that they are, without the code on their hub page.

- The config is mapped; the tensors are renamed, and the packed wqkv is cut, as views of the memory map: nothing is
  copied until transformers takes a tensor in, except q, k, v of the layers, a tenth of the model.
- wqkv holds, for each key/value head, its query heads, its key, its value: (G, H/G + 2, D_head, D).
- What is saved has Llama's layout. Its tokenizer: `internlm2_tokenizer.py`.

The model: Cai et al. 2024, arXiv:2403.17297, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from finetuner.errors import ModelError, Problem
from finetuner.model import folder as files

NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""InternLM2's names and Llama's; in the layers they follow "model.layers.N."."""
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)
"""Fields that mean the same in both configs."""


def is_model(config: dict[str, Any]) -> bool:
    """Whether config.json is an InternLM2's."""
    return config.get("model_type") == "internlm2"


def read_config(values: dict[str, Any]) -> LlamaConfig:
    """Llama's config of an InternLM2's."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", 10_000))}
    scaling = dict(values.get("rope_scaling") or {})
    if scaling:
        rope["rope_type"] = scaling.pop("type", None) or scaling.pop("rope_type", "default")
        rope |= scaling
    # Their defaults differ from Llama's.
    mapped = {"num_key_value_heads": values.get("num_attention_heads"), "tie_word_embeddings": False}
    mapped |= {name: values[name] for name in KEPT if values.get(name) is not None}
    config = LlamaConfig(**mapped, attention_bias=bool(values.get("bias", True)), mlp_bias=False, rope_parameters=rope)
    config.architectures = ["LlamaForCausalLM"]
    return config


def read_model(
    folder: Path, config: PreTrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As `LlamaForCausalLM.from_pretrained`, of an InternLM2's folder."""
    state = {name: tensor for old, held in files.tensors(folder) for name, tensor in renamed(old, held, config)}
    model, info = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, **options)
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def renamed(name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensor under Llama's name, or three for a packed one; an unknown name stays, to be told as unexpected."""
    stem, _, kind = name.rpartition(".")
    layer, inner = "", stem
    if stem.startswith("model.layers."):
        _, _, number, inner = stem.split(".", 3)
        layer = f"model.layers.{number}."
    if inner == "attention.wqkv":
        for part, cut in zip("qkv", unpacked(tensor, config)):
            yield f"{layer}self_attn.{part}_proj.{kind}", cut
    else:
        yield f"{layer}{NAMES.get(inner, inner)}.{kind}", tensor


def unpacked(packed: Tensor, config: PreTrainedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a packed weight (or bias)."""
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    size, queries = config.hidden_size // heads, heads // groups
    if packed.shape[0] != groups * (queries + 2) * size:
        what, fits = "the packed attention weight does not fit the config", f"{groups * (queries + 2) * size} rows"
        found, remedy = str(tuple(packed.shape)), "fetch the model again"
        raise ModelError(Problem("E-MODEL-SHAPE", what, "attention.wqkv", found, fits, remedy))
    rest = packed.shape[1:]
    parts = packed.view(groups, queries + 2, size, *rest)
    q, k, v = parts[:, :queries], parts[:, queries], parts[:, queries + 1]
    return q.reshape(heads * size, *rest), k.reshape(groups * size, *rest), v.reshape(groups * size, *rest)
