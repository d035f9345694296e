"""An adapter from a file: no bit lost where it trains on; for answering whoever made it, wholly or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import rig
import torch
from model_rig import folder_of, learner_of, row
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetuner.config.model import LoRA
from finetuner.errors import ModelError
from finetuner.model import adapter

IDS = torch.tensor([[0, 40, 99, 120, 7, 60]])
SAVED = {"targets": ("q_proj",), "modules_to_save": ("lm_head", "norm")}
FOREIGN = {
    "targets by a pattern": (False, LoraConfig(r=2, target_modules=r".*layers\.1\..*(q|v)_proj")),
    "embedding": (False, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "tied embedding": (True, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "tied head": (True, LoraConfig(r=2, target_modules=["lm_head", "q_proj"])),
    "a rank of its own": (False, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3})),
    "saved norms": (False, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"])),
    "dora": (False, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    "ia3": (False, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


def made(base: Path, folder: Path, config) -> torch.Tensor:
    """Writes an adapter of random numbers by peft alone; gives its logits."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def plain(tmp_path):
    """A LoRA of peft's on a model of its own."""
    llama = rig.tiny_llama(tmp_path / "base")
    made(llama, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return llama, tmp_path / "adapter"


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_adapter_says_what_peft_says(case, tmp_path):
    tied, config = FOREIGN[case]
    llama = rig.tiny_llama(tmp_path / "base", tie_word_embeddings=tied, initializer_range=0.1)
    wanted = made(llama, tmp_path / "adapter", config)
    model = AutoModelForCausalLM.from_pretrained(llama)
    bare = model(input_ids=IDS).logits
    loaded = adapter.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    assert not torch.allclose(bare, wanted)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def lose(tensors):
    del tensors[sorted(tensors)[0]]


def rename(tensors):
    name = next(name for name in tensors if "layers.1" in name)
    tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()


def spoil(tensors):
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("edit", "told"),
    [(lose, "lora_A.weight is missing"), (rename, r"layers\.7\..* matches nothing"), (spoil, "no finite number")],
)
def test_an_adapter_that_does_not_fit_wholly_is_told(edit, told, plain):
    base, folder = plain
    change(folder, edit)
    with pytest.raises(ModelError, match=rf"E-ADAPTER-FIT(.|\n)*{told}"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)


def test_the_law_notices_what_peft_leaves_out_in_silence(plain):
    base, folder = plain
    change(folder, rename)
    change(folder, lose)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_a_base_of_another_size_is_told(plain, tmp_path):
    other = rig.tiny_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(ModelError, match=r"E-ADAPTER-FIT(.|\n)*\(2, 32\), \(2, 64\) fits"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained(other), plain[1])


def test_a_base_without_the_targets_is_told(plain, tmp_path):
    other = folder_of("phi3", tmp_path / "phi3")
    with pytest.raises(ModelError, match=r"E-ADAPTER-FIT(.|\n)*q_proj"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained(other), plain[1])


def test_a_copied_embedding_of_another_size_is_told(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base", vocab_size=400)
    made(llama, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    change(
        tmp_path / "adapter", lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(408, 32)})
    )
    with pytest.raises(ModelError, match="E-ADAPTER-FIT"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")


def test_a_kind_that_is_not_in_the_layers_is_refused(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    made(llama, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ModelError, match=r"E-ADAPTER-FORM(.|\n)*PROMPT_TUNING"):
        adapter.load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "prompt")


def test_what_this_peft_does_not_know_is_told(plain, monkeypatch):
    base, folder = plain
    said = []
    monkeypatch.setattr(adapter, "warn", said.append)
    adapter.load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    assert said == []
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_tomorrow": True, "unused": None}))
    adapter.load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    assert len(said) == 1
    assert "use_tomorrow" in said[0]


def started(tmp_path, **fields):
    """The masters of a learner beside a bfloat16 base, and of one that goes on from what it saved."""
    llama = rig.tiny_llama(tmp_path / "base", dtype="bfloat16")
    asked = {"dtype": "bfloat16", "new_tokens": ("<|call|>",)}
    first = learner_of(llama, adapter=LoRA(rank=2, **fields), **asked)
    torch.manual_seed(4)
    with torch.no_grad():
        for _, parameter in first.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    first.save(tmp_path / "one")
    second = learner_of(llama, adapter=LoRA(rank=2, start=str(tmp_path / "one"), **fields), **asked)
    return first.masters(), second.masters()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "fields", [{}, SAVED, SAVED | {"modules_to_save": ("lm_head", "embed_tokens")}, {"dora": True}]
)
def test_an_adapter_goes_on_bit_for_bit_beside_a_narrower_base(fields, tmp_path):
    first, second = started(tmp_path, **fields)
    assert {tensor.dtype for tensor in second.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in first.values())
    assert equal(first, second)


def test_the_law_notices_weights_that_go_through_the_bases_dtype(tmp_path, monkeypatch):
    def rounding(model, folder, config, base):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
        for parameter in adapted.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        return adapted

    monkeypatch.setattr(adapter, "go_on", rounding)
    assert not equal(*started(tmp_path, **SAVED))


def test_an_adapter_goes_on_with_the_configs_dropout(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    learner_of(llama, adapter=LoRA(rank=2, dropout=0.3)).save(tmp_path / "one")
    learner = learner_of(llama, adapter=LoRA(rank=2, dropout=0.1, start=str(tmp_path / "one")))
    assert learner.model.peft_config["default"].lora_dropout == 0.1
    drops = {m.p for name, m in learner.named_modules() if name.endswith("lora_dropout.default")}
    assert drops == {0.1}


@pytest.mark.parametrize(("kind", "told"), [("mixtral", ["experts.down_proj", "experts.gate_up_proj"]), ("llama", [])])
def test_matrices_that_all_linear_leaves_out_are_told_once(kind, told, tmp_path, monkeypatch):
    from transformers import AutoConfig

    said = []
    monkeypatch.setattr(adapter, "warn", said.append)
    folder = rig.tiny_llama(tmp_path / kind)
    if kind == "mixtral":
        config = AutoConfig.for_model(
            "mixtral", vocab_size=382, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        (folder / "config.json").unlink()
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    learner = learner_of(folder, adapter=LoRA(rank=2))
    learner(row((5, 4))).backward()
    assert len(said) == (1 if told else 0)
    assert all(name in said[0] for name in told)
    learner_of(folder, adapter=LoRA(rank=2, targets=("q_proj",)))
    assert len(said) == (1 if told else 0), "who names targets knows them"


def test_a_folder_that_is_no_adapters_is_told(plain, tmp_path):
    base, folder = plain
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        other = tmp_path / name
        shutil.copytree(folder, other)
        (other / name).unlink()
        with pytest.raises(ModelError, match=f"no {name}"):
            adapter.load_adapter(AutoModelForCausalLM.from_pretrained(base), other)
