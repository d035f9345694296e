"""What is wrong with a base is told before anything is trained, and nothing is made up in silence."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import rig
import torch
from model_rig import CPU, learner_of, row
from safetensors.torch import load_file, save_file

from finetuner.config.model import NF4, CausalLM, Fresh, LoRA
from finetuner.errors import ModelError
from finetuner.model import soundness, weights
from finetuner.model.build import build, checked_tokenizer


@pytest.fixture
def llama(tmp_path):
    return rig.tiny_llama(tmp_path / "llama")


def change(folder, **values):
    """Rewrites fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder, change_tensors):
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def missing_shard(folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_key(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def unexpected_key(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}))


def other_shape(folder):
    change(folder, intermediate_size=128)


def nan(folder):
    rewrite(
        folder,
        lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].index_fill_(0, torch.tensor(3), float("nan")),
    )


def infinite(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))


def quantised(folder):
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def code_needed(folder):
    change(folder, model_type="unheard_of", auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def torn_config(folder):
    (folder / "config.json").write_text("{")


def no_language_model(folder):
    change(folder, model_type="clip_vision_model")


WRONG = {
    no_config: ("E-MODEL-CONFIG", "config.json"),
    no_weights: ("E-MODEL-WEIGHTS", "no weights at all"),
    only_a_pickle: ("E-MODEL-WEIGHTS", "pytorch_model.bin"),
    truncated: ("E-MODEL-TORN", "model.safetensors"),
    empty: ("E-MODEL-TORN", "model.safetensors"),
    missing_shard: ("E-MODEL-SHARD", "model-00001-of-00002.safetensors"),
    missing_key: ("E-MODEL-MISSING", "model.layers.1.mlp.up_proj.weight"),
    unexpected_key: ("E-MODEL-UNEXPECTED", "model.layers.7.mlp.up_proj.weight"),
    other_shape: ("E-MODEL-SHAPE", "model.layers.0.mlp.up_proj.weight is (64, 32), (128, 32) fits"),
    nan: ("E-MODEL-NAN", "model.layers.0.self_attn.q_proj.weight"),
    infinite: ("E-MODEL-NAN", "model.norm.weight"),
    quantised: ("E-MODEL-QUANTISED", "gptq"),
    code_needed: ("E-MODEL-CODE", "unheard_of"),
    torn_config: ("E-MODEL-JSON", "config.json"),
    no_language_model: ("E-MODEL-KIND", "clip_vision_model"),
}


@pytest.mark.parametrize(
    "fields", [{}, {"adapter": LoRA(rank=2)}, {"adapter": LoRA(rank=2), "quant": NF4()}], ids=["full", "lora", "qlora"]
)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_base_is_told(llama, wrong, fields):
    wrong(llama)
    code, words = WRONG[wrong]
    with pytest.raises(ModelError) as caught:
        build(CausalLM(str(llama), **fields), CPU, dialogues=False)
    text = str(caught.value)
    assert code in {problem.code for problem in caught.value.problems}, text
    assert words in text
    assert "remedy:" in text or code in ("E-MODEL-KIND", "E-MODEL-LOAD"), text


def test_the_checks_are_what_finds_it(llama, monkeypatch):
    """The mutant: transformers alone trains on with weights that it made up."""
    missing_key(llama)
    monkeypatch.setattr(weights, "check_keys", lambda info, folder: None)
    assert build(CausalLM(str(llama)), CPU, dialogues=False)


def test_check_finds_what_it_can_without_reading_a_weight(llama, monkeypatch):
    monkeypatch.setattr(weights, "load_weights", None)
    checked_tokenizer(CausalLM(str(llama)), 512, dialogues=False)
    with pytest.raises(ModelError, match="E-LENGTH"):
        checked_tokenizer(CausalLM(str(llama)), 513, dialogues=False)
    missing_shard(llama)
    with pytest.raises(ModelError, match="E-MODEL-SHARD"):
        checked_tokenizer(CausalLM(str(llama)), 64, dialogues=False)


def test_a_path_or_a_hub_name_that_is_not_there_is_told():
    for path, code in (
        ("./nowhere", "E-MODEL-PATH"),
        ("org/not-in-the-cache", "E-MODEL-HUB"),
        ("/no/such/dir", "E-MODEL-PATH"),
    ):
        with pytest.raises(ModelError, match=code):
            build(CausalLM(path), CPU, dialogues=False)


def test_an_adapter_folder_given_as_the_model_is_told(llama, tmp_path):
    learner_of(llama, adapter=LoRA(rank=2)).save(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"LoRA\(start=\.\.\.\)"):
        learner_of(tmp_path / "adapter")


def test_code_in_a_local_folder_is_never_run(llama, tmp_path):
    code_needed(llama)
    canary = tmp_path / "canary"
    (llama / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    for fields in ({}, {"remote_code": "0" * 40}):
        with pytest.raises(ModelError, match="E-MODEL-CODE"):
            build(CausalLM(str(llama), **fields), CPU, dialogues=False)
    assert not canary.exists()


def test_code_beside_a_known_model_is_not_run_either(llama, tmp_path):
    canary = tmp_path / "canary"
    change(llama, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"})
    settings = llama / "tokenizer_config.json"
    held = json.loads(settings.read_text()) | {"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}}
    settings.write_text(json.dumps(held))
    (llama / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    for fields in ({}, {"remote_code": "0" * 40}):
        assert build(CausalLM(str(llama), **fields), CPU, dialogues=False)
    assert not canary.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields", [{}, {"adapter": LoRA(rank=2)}, {"adapter": LoRA(rank=2), "quant": NF4()}], ids=["full", "lora", "qlora"]
)
def test_rotary_frequencies_are_float32_and_the_formulas(tmp_path, fields, dtype):
    llama = rig.tiny_llama(tmp_path, dtype="bfloat16")
    learner = learner_of(llama, dtype=dtype, **fields)
    frequencies = learner.causal.base_model.rotary_emb.inv_freq
    right = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2).double() / 8)
    assert frequencies.dtype == torch.float32
    assert ((frequencies.double() - right).abs() / right).max() < 1e-7
    learner.causal.base_model.rotary_emb.to(torch.bfloat16)  # the mutant: a cast of the whole model
    with pytest.raises(ModelError, match="E-MODEL-ROPE"):
        soundness.check_frequencies(learner.causal)


def test_positions_count_rope_scaling():
    from transformers import LlamaConfig

    plain = LlamaConfig(max_position_embeddings=4096)
    dynamic = LlamaConfig(max_position_embeddings=32768, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    llama3 = LlamaConfig(max_position_embeddings=131072, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})  # fmt: skip
    yarn = LlamaConfig(max_position_embeddings=32768, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})  # fmt: skip
    assert [soundness.positions(config) for config in (plain, dynamic, llama3, yarn)] == [4096, 65536, 131072, 131072]
    soundness.check_length(plain, 4096)
    with pytest.raises(ModelError, match="E-LENGTH"):
        soundness.check_length(plain, 4097)


FRESH = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_a_fresh_model_follows_its_seed_and_its_tokenizer(tmp_path):
    folder = str(rig.tokenizer(tmp_path))
    state = torch.get_rng_state()
    one, two, other = (build(CausalLM(Fresh(FRESH, folder, seed=s)), CPU, dialogues=True).learner for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.trainable(), two.trainable()))
    assert not torch.equal(one.trainable()[0][1], other.trainable()[0][1])
    assert one.causal.config.vocab_size == len(one.tokenizer)
    assert one.causal.config.eos_token_id == one.tokenizer.eos_token_id
    assert one.stored == torch.float32
    assert one(row((5, 4))).item() > 0


@pytest.mark.parametrize(
    "values", [{"model_type": "unheard_of"}, {"hidden_size": 33}, {"num_attention_heads": 0}, {"hidden_act": "nothing"}]
)
def test_a_fresh_config_that_makes_no_model_is_told(tmp_path, values):
    with pytest.raises(ModelError, match="E-MODEL-FRESH"):
        build(CausalLM(Fresh(FRESH | values, str(rig.tokenizer(tmp_path)))), CPU, dialogues=False)


def test_a_tokenizer_that_would_be_another_one_beside_the_model_is_refused(tmp_path):
    """transformers splits text in Qwen2's way beside a Qwen2 model, whatever tokenizer.json says."""
    folder = str(rig.tokenizer(tmp_path))
    with pytest.raises(ModelError, match="E-TOKENIZER-FAMILY"):
        build(CausalLM(Fresh(FRESH | {"model_type": "qwen2"}, folder)), CPU, dialogues=False)
    assert build(CausalLM(Fresh(FRESH | {"model_type": "mistral"}, folder)), CPU, dialogues=False)


def test_a_cached_hub_model_is_found_offline(llama, tmp_path, monkeypatch):
    """The cache is laid out as the hub's client does it."""
    from huggingface_hub import constants

    commit = "a" * 40
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(llama, repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    learner = learner_of("org/name", adapter=LoRA(rank=2))
    learner.save(tmp_path / "saved")
    held = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert held["base_model_name_or_path"] == "org/name"
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=re.compile("E-MODEL-(HUB|WEIGHTS)")):
        learner_of("org/name")
