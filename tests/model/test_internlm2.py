"""InternLM2 checkpoints load without their code, equal to the model's definition written out in plain torch."""

from __future__ import annotations

import json

import pytest
import rig
import torch
import torch.nn.functional as F
from model_rig import gradients, learner_of, row
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetuner.config.model import NF4, LoRA
from finetuner.errors import ModelError
from finetuner.model import internlm2

HIDDEN, HEADS, GROUPS, LAYERS, INNER, THETA, EPS = 64, 8, 2, 2, 96, 1_000_000, 1e-6
SIZE = HIDDEN // HEADS


def made(folder, *, bias=False, tied=False, scaling=None, positions=64, shards=2, dtype=torch.float32):
    """A random InternLM2 checkpoint with the rig's tokenizer; its tensors by name, too."""
    rig.tokenizer(folder)
    vocabulary = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    tensors = {"model.tok_embeddings.weight": draw(vocabulary, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    if not tied:
        tensors["output.weight"] = draw(vocabulary, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        tensors |= {
            layer + "attention.wqkv.weight": draw((HEADS + 2 * GROUPS) * SIZE, HIDDEN),
            layer + "attention.wo.weight": draw(HIDDEN, HIDDEN),
            layer + "feed_forward.w1.weight": draw(INNER, HIDDEN),
            layer + "feed_forward.w3.weight": draw(INNER, HIDDEN),
            layer + "feed_forward.w2.weight": draw(HIDDEN, INNER),
            layer + "attention_norm.weight": 1 + draw(HIDDEN),
            layer + "ffn_norm.weight": 1 + draw(HIDDEN),
        }
        if bias:
            tensors |= {layer + "attention.wqkv.bias": draw((HEADS + 2 * GROUPS) * SIZE),
                        layer + "attention.wo.bias": draw(HIDDEN)}  # fmt: skip
    config = {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": bias, "hidden_size": HIDDEN,
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config",
                     "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "silu",
        "num_key_value_heads": GROUPS, "max_position_embeddings": positions, "rms_norm_eps": EPS, "rope_theta": THETA,
        "rope_scaling": scaling, "tie_word_embeddings": tied, "vocab_size": vocabulary, "attn_implementation": "eager",
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    parts = [names[k::shards] for k in range(shards)]
    index = {}
    for k, part in enumerate(parts):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tensors


def definition(tensors, ids, *, scaling=None, positions=64):
    """InternLM2's forward: logits (T, V) of one document, in plain torch and float32."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * tensors[name].float()

    def linear(x, name):
        bias = tensors.get(name + ".bias")
        return F.linear(x, tensors[name + ".weight"].float(), None if bias is None else bias.float())

    length, base = len(ids), float(THETA)
    if scaling is not None and length > positions:  # dynamic NTK scaling
        base *= (scaling["factor"] * length / positions - (scaling["factor"] - 1)) ** (SIZE / (SIZE - 2))
    angles = torch.arange(length)[:, None] / base ** (torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def turned(x_TD):
        first, second = x_TD[:, : SIZE // 2], x_TD[:, SIZE // 2 :]
        return x_TD * cos + torch.cat([-second, first], -1) * sin

    hidden = tensors["model.tok_embeddings.weight"].float()[ids]
    causal = torch.full((length, length), float("-inf")).triu(1)
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        packed = linear(norm(hidden, layer + "attention_norm.weight"), layer + "attention.wqkv")
        each = HEADS // GROUPS
        heads = packed.view(length, GROUPS, each + 2, SIZE)
        out = []
        for group in range(GROUPS):
            key, value = turned(heads[:, group, each]), heads[:, group, each + 1]
            for head in range(each):
                scores = turned(heads[:, group, head]) @ key.T / SIZE**0.5 + causal
                out.append(scores.softmax(-1) @ value)
        hidden = hidden + linear(torch.cat(out, -1), layer + "attention.wo")
        inner = norm(hidden, layer + "ffn_norm.weight")
        gated = F.silu(linear(inner, layer + "feed_forward.w1")) * linear(inner, layer + "feed_forward.w3")
        hidden = hidden + linear(gated, layer + "feed_forward.w2")
    head = tensors.get("output.weight", tensors["model.tok_embeddings.weight"]).float()
    return norm(hidden, "model.norm.weight") @ head.T


CASES = {
    "plain": {}, "bias": {"bias": True}, "tied": {"tied": True}, "one file": {"shards": 1},
    "dynamic": {"scaling": {"type": "dynamic", "factor": 2.0}, "positions": 16},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition(tmp_path, case):
    tensors = made(tmp_path, **CASES[case])
    learner = learner_of(tmp_path)
    where = {name: CASES[case][name] for name in ("scaling", "positions") if name in CASES[case]}
    for length in (5, 24):
        ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length))
        with learner.answering() as model:
            found = model(ids[None]).logits[0]
        right = definition(tensors, ids, **where)
        assert (found - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_packed_row_learns_as_the_definition(tmp_path):
    tensors = {name: tensor.requires_grad_() for name, tensor in made(tmp_path).items()}
    batch = row((7, 9))
    loss, grads = gradients(learner_of(tmp_path), batch)
    total, start = 0.0, 0
    for length in batch.lengths:
        ids, aims = batch.tokens_1T[0, start : start + length], batch.targets_1T[0, start : start + length]
        part = F.cross_entropy(definition(tensors, ids), aims, ignore_index=-100, reduction="sum")
        part.backward()
        total, start = total + part.item(), start + length
    assert loss == pytest.approx(total, rel=1e-5)
    norm = tensors["model.layers.1.ffn_norm.weight"].grad
    assert (grads["model.layers.1.post_attention_layernorm.weight"] - norm).norm() / norm.norm() <= 1e-5
    packed = tensors["model.layers.0.attention.wqkv.weight"].grad.view(GROUPS, HEADS // GROUPS + 2, SIZE, HIDDEN)
    key = packed[:, -2].reshape(-1, HIDDEN)
    assert (grads["model.layers.0.self_attn.k_proj.weight"] - key).norm() / key.norm() <= 1e-5


def test_the_mutant_that_cuts_wqkv_in_three_blocks_is_seen(tmp_path, monkeypatch):
    tensors = made(tmp_path)
    monkeypatch.setattr(
        internlm2, "unpacked", lambda packed, config: packed.split([HIDDEN, GROUPS * SIZE, GROUPS * SIZE])
    )
    ids = torch.arange(10, 16)
    with learner_of(tmp_path).answering() as model:
        assert (model(ids[None]).logits[0] - definition(tensors, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [{"adapter": LoRA(rank=2)}, {"adapter": LoRA(rank=2), "quant": NF4()}])
def test_it_takes_adapters(tmp_path, fields):
    made(tmp_path)
    loss, grads = gradients(learner_of(tmp_path, **fields), row((7, 9)))
    assert loss > 0
    assert all(grad is not None for grad in grads.values())
    assert any("q_proj.lora_B" in name and grad.norm() > 0 for name, grad in grads.items())


def test_it_is_saved_as_the_llama_that_it_is(tmp_path):
    tensors = made(tmp_path / "base", dtype=torch.bfloat16)
    learner_of(tmp_path / "base").save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.dtype == torch.bfloat16
    ids = torch.arange(10, 16)
    assert torch.allclose(loaded.float()(ids[None]).logits[0], definition(tensors, ids), atol=1e-5)
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["model_type"] == "llama"
    assert "auto_map" not in held


def test_missing_unexpected_and_misshapen_tensors_are_told(tmp_path):
    tensors = made(tmp_path, shards=1)
    for change, code in (
        (lambda t: t.pop("model.layers.1.feed_forward.w3.weight"), "E-MODEL-MISSING"),
        (lambda t: t.update({"model.layers.1.feed_forward.w9.weight": torch.ones(2)}), "E-MODEL-UNEXPECTED"),
        (lambda t: t.update({"model.layers.1.attention.wqkv.weight": torch.ones(8, HIDDEN)}), "E-MODEL-SHAPE"),
        (lambda t: t.update({"model.layers.1.attention.wo.weight": torch.ones(8, HIDDEN)}), "E-MODEL-SHAPE"),
    ):
        wrong = dict(tensors)
        change(wrong)
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=code):
            learner_of(tmp_path)


def test_its_code_is_not_run(tmp_path):
    made(tmp_path)
    canary = tmp_path / "canary"
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')")
    learner_of(tmp_path)
    assert not canary.exists()
