"""What our own training writes is merged whole: new tokens, InternLM2's layout, other names of one fact."""

import json
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.config.model import CausalLM, LoRA
from finetuner.export.merge import merge
from finetuner.generate.load import load_for_chat
from finetuner.model.build import build
from finetuner.model.portable import portable_config

IDS = [5, 20, 30, 7, 99, 6, 41, 300]
WHO = [{"role": "user", "content": "who?"}]


def trained(source: CausalLM, folder: Path, extra: tuple[int, ...] = ()) -> torch.Tensor:
    """Saves a learner whose trained numbers are random; gives its own logits."""
    learner, _ = build(source, torch.device("cpu"), dialogues=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    learner.save(folder)
    with learner.answering() as causal:
        logits: torch.Tensor = causal(input_ids=torch.tensor([[*IDS, *extra]])).logits[0].float()
    return logits


def plain(folder: Path, extra: tuple[int, ...] = ()) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[*IDS, *extra]])).logits[0]
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [(), ("lm_head", "embed_tokens")])
def test_new_tokens_come_along(tied: bool, saved: tuple[str, ...], tmp_path: Path) -> None:
    if tied and saved:
        pytest.skip("refused when the adapter is made")
    base = rig.tiny_llama(tmp_path / "base", initializer_range=0.1, tie_word_embeddings=tied)
    known = len(AutoTokenizer.from_pretrained(base))
    extra = (known, known + 1)
    source = CausalLM(str(base), adapter=LoRA(rank=4, modules_to_save=saved), dtype="float32",
                      new_tokens=("<|yes|>", "<|no|>"))  # fmt: skip
    wanted = trained(source, tmp_path / "checkpoint", extra)
    report = merge(str(tmp_path / "checkpoint"), tmp_path / "out")
    found = plain(tmp_path / "out", extra)
    assert float((found - wanted).abs().max()) <= 1e-5
    assert report.tied == tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|yes|>", "<|no|>"]) == list(extra)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == found.shape[1] >= known + 2
    said = [load_for_chat(str(tmp_path / name), device="cpu").ask(WHO, max_tokens=9) for name in ("checkpoint", "out")]
    assert said[0] == said[1]


def internlm2(folder: Path) -> Path:
    """A made InternLM2 checkpoint: a tiny Llama under InternLM2's names, with wqkv packed by an oracle of its own."""
    rig.tiny_llama(folder, initializer_range=0.1)
    held = load_file(folder / "model.safetensors")
    packed: dict[str, torch.Tensor] = {
        "model.tok_embeddings.weight": held["model.embed_tokens.weight"],
        "model.norm.weight": held["model.norm.weight"],
        "output.weight": held["lm_head.weight"],
    }
    names = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for number in range(2):
        layer = f"model.layers.{number}."
        for new, old in names.items():
            packed[f"{layer}{old}.weight"] = held[f"{layer}{new}.weight"]
        q, k, v = (held[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv")
        rows = [torch.cat([q[g * 16 : g * 16 + 16], k[g * 8 : g * 8 + 8], v[g * 8 : g * 8 + 8]]) for g in range(2)]
        packed[f"{layer}attention.wqkv.weight"] = torch.cat(rows)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "attention_bias", "mlp_bias", "head_dim", "pretraining_tp"):
        config.pop(name, None)
    auto = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "auto_map": auto,
               "rope_theta": 10000.0, "torch_dtype": "float32"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_internlm2_base_is_merged_into_llamas_layout(tmp_path: Path) -> None:
    base = internlm2(tmp_path / "base")
    wanted = trained(CausalLM(str(base), adapter=LoRA(rank=4), dtype="float32"), tmp_path / "checkpoint")
    merge(str(tmp_path / "checkpoint"), tmp_path / "out")
    assert float((plain(tmp_path / "out") - wanted).abs().max()) <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["rope_theta"] == 10000.0
    assert "auto_map" not in config


def test_the_template_of_training_travels(tmp_path: Path) -> None:
    base = rig.tiny_llama(tmp_path / "base", initializer_range=0.1)
    trained(CausalLM(str(base), adapter=LoRA(rank=4), dtype="float32", template="vicuna"), tmp_path / "checkpoint")
    merge(str(tmp_path / "checkpoint"), tmp_path / "out")
    ids = [AutoTokenizer.from_pretrained(tmp_path / name).apply_chat_template(WHO, return_dict=True)["input_ids"]
           for name in ("base", "checkpoint", "out")]  # fmt: skip
    assert ids[1] == ids[2] != ids[0]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {}),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"_name_or_path": "x", "auto_map": {}, "quantization_config": {}}, {}),
    ],
)
def test_a_config_gains_the_names_that_older_readers_know(given: dict[str, Any], added: dict[str, Any]) -> None:
    dropped = ("_name_or_path", "auto_map", "quantization_config")
    kept = {key: value for key, value in given.items() if key not in dropped}
    wanted = kept | added | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert portable_config(given, torch.bfloat16) == wanted


def test_both_names_of_a_rope_mean_one_thing_to_transformers(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    base = rig.tiny_llama(tmp_path / "base", initializer_range=0.1, rope_parameters=scaled)
    before = plain(base)
    config = portable_config(json.loads((base / "config.json").read_text()), torch.float32)
    (base / "config.json").write_text(json.dumps(config))
    assert torch.equal(plain(base), before)
    for gone in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        fewer = {key: value for key, value in config.items() if key not in gone}
        (base / "config.json").write_text(json.dumps(fewer))
        assert torch.equal(plain(base), before)
