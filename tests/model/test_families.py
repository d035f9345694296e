"""What each family of transformers' language models learns in a packed row is what it learns of its documents apart.

A family is served by our attention; or told, and served by transformers' own; or refused. No row is silently mixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_rig import row

from finetuner.data.batch import IGNORED
from finetuner.errors import ModelError
from finetuner.model import attention
from finetuner.model.causal_lm import CausalLearner

LENGTHS = (7, 9, 9, 1, 5)
WINDOW = {"sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 4,
}  # fmt: skip
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0}  # fmt: skip

OURS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": WINDOW, "ministral": MIXED | {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}, "phi": {}, "phi3": {},
    "olmo": {}, "olmo2": {}, "olmo3": MIXED, "olmoe": EXPERTS, "granite": {"attention_multiplier": 0.3},
    "granitemoe": EXPERTS, "internlm3": {}, "starcoder2": WINDOW | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "cohere": {}, "cohere2": MIXED, "mixtral": EXPERTS, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8}, "glm": {"head_dim": 8}, "glm4": {"head_dim": 8}, "gpt2": GPT2,
    "gpt_bigcode": GPT2, "gpt_neox": {}, "smollm3": {}, "exaone4": MIXED, "ernie4_5": {"head_dim": 8},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "persimmon": {}, "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8}, "arcee": {}, "apertus": {}, "bitnet": {}, "nanochat": {},
}  # fmt: skip

OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": ("eager", "attention of its own kind", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}),
    "vaultgemma": ("eager", "attention of its own kind", {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}),
    "stablelm": ("sdpa", "does not take another attention", {}),
    "gpt_neox_japanese": (
        "eager",
        "does not take another attention",
        {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "llama4_text": ("sdpa", "attention_chunk_size", {"head_dim": 8, "attention_chunk_size": 64, **EXPERTS}),
    "nemotron": ("sdpa", "no documents reach its attention", {}),
    "doge": ("sdpa", "a mask of its own", {}),
}
"""Family: transformers' attention that it goes through, why, and its config."""

REFUSED: dict[str, dict[str, Any]] = {
    "gpt_oss": EXPERTS | MIXED | {"head_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"n_layers": 2, "n_heads": 4, "d_model": 32},
    "biogpt": {},
    "mamba": {"state_size": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""Families whose own code mixes packed documents, or their positions, in every way that there is."""


def causal(kind: str, fields: dict[str, Any]) -> Any:
    """A tiny model of the family; the same one each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values | fields), attn_implementation="eager")


def learner_of(kind: str, fields: dict[str, Any]) -> Any:
    attention.register()
    model, tokenizer = causal(kind, fields), None
    attends = attention.attention_for(model, "auto")
    known = {"adapted": False, "attends": attends, "compute": torch.float32, "stored": torch.float32}
    return CausalLearner(model, tokenizer, **known)  # type: ignore[arg-type]


def apart(kind: str, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The oracle: gradients of one document after another, by transformers' eager attention."""
    model, batch, start = causal(kind, fields), row(LENGTHS), 0
    for length in LENGTHS:
        places = slice(start, start + length)
        logits_LV = model(batch.tokens_1T[:, places], use_cache=False).logits[0]
        F.cross_entropy(logits_LV, batch.targets_1T[0, places], ignore_index=IGNORED, reduction="sum").backward()
        start += length
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(learner: Any, kind: str, fields: dict[str, Any]) -> None:
    truth = apart(kind, fields)
    learner(row(LENGTHS)).backward()
    found = {name: parameter.grad for name, parameter in learner.trainable()}
    whole = sum(float(grad.square().sum()) for grad in truth.values()) ** 0.5
    assert all(grad is None or not grad.any() for name, grad in found.items() if name not in truth)
    for name, grad in truth.items():
        assert (found[name] - grad).norm() <= 1e-5 * max(float(grad.norm()), 1e-3 * whole), name


def hidden(learner: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = learner.causal.base_model(**learner.inputs(batch.tokens_1T, batch)).last_hidden_state
    return found


@pytest.mark.parametrize("kind", OURS)
def test_a_family_learns_of_a_row_what_it_learns_of_its_documents(kind: str) -> None:
    learner = learner_of(kind, OURS[kind])
    assert learner.attends == "finetuner"
    check(learner, kind, OURS[kind])
    one, two = hidden(learner, row(LENGTHS)), hidden(learner, row(LENGTHS, other=1))
    assert torch.equal(one[:, :7], two[:, :7])
    assert torch.equal(one[:, 16:], two[:, 16:])
    assert not torch.equal(one[:, 7:16], two[:, 7:16])


@pytest.mark.parametrize("kind", OWN)
def test_a_family_that_we_cannot_serve_is_told_and_goes_its_own_exact_way(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, why, fields = OWN[kind]
    told: list[str] = []
    monkeypatch.setattr(attention, "say", told.append)
    learner = learner_of(kind, fields)
    assert learner.attends == learner.causal.config._attn_implementation == name
    assert len(told) == 1
    assert f"attention: transformers' {name}, for " in told[0]
    assert why in told[0]
    check(learner, kind, fields)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_nothing_keeps_apart_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match="E-ATTENTION-LEAK"):
        learner_of(kind, REFUSED[kind])


def test_a_window_that_does_not_reach_the_attention_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every token sees its whole document."""
    from transformers import AttentionInterface

    right = attention.documents_apart
    learner = learner_of("mistral", WINDOW)
    wrong = lambda *given, sliding_window=None, **more: right(*given, **more)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, wrong)
    with pytest.raises(AssertionError):
        check(learner, "mistral", WINDOW)
