"""Adapters: names that fit, adapters that go on, pairs that are refused."""

from __future__ import annotations

import json

import pytest
import rig
import torch
from model_rig import gradients, learner_of, row
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from finetuner.config.model import NF4, LoRA
from finetuner.errors import ModelError
from finetuner.model import adapter, targets

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def adapted(learner):
    return sorted({name.split(".lora_A")[0].rpartition(".")[2] for name, _ in learner.trainable() if "lora_A" in name})


@pytest.mark.parametrize("quant", [None, NF4()])
def test_all_linear_is_every_linear_layer_but_the_head(llama, quant):
    learner = learner_of(llama, adapter=LoRA(rank=2), quant=quant)
    assert adapted(learner) == ALL
    assert sum("lora_A" in name for name, _ in learner.trainable()) == 2 * len(ALL)


def test_every_misspelt_target_is_told_with_the_right_name(llama):
    with pytest.raises(ModelError) as caught:
        learner_of(llama, adapter=LoRA(targets=("q_proj", "v_porj", "gate_prj"), modules_to_save=("lm_heed",)))
    assert [problem.what for problem in caught.value.problems] == [
        "v_porj matches no module", "gate_prj matches no module", "lm_heed matches no module"]  # fmt: skip
    for name in ("v_proj", "gate_proj", "lm_head"):
        assert f"did you mean {name}?" in str(caught.value)


def test_the_mutant_that_leaves_the_check_to_peft_trains_half(llama, monkeypatch):
    monkeypatch.setattr(targets, "problem_of", lambda model, field, name: None)
    assert adapted(learner_of(llama, adapter=LoRA(rank=2, targets=("q_proj", "v_porj")))) == ["q_proj"]


def test_a_path_is_a_target_too(llama):
    learner = learner_of(llama, adapter=LoRA(rank=2, targets=("layers.1.self_attn.q_proj",)))
    assert sum("lora_A" in name for name, _ in learner.trainable()) == 1


def test_a_target_that_is_no_linear_layer_is_refused(llama):
    with pytest.raises(ModelError, match="input_layernorm is no linear layer"):
        learner_of(llama, adapter=LoRA(targets=("input_layernorm",)))


@pytest.mark.parametrize(
    "fields", [{"targets": ("lm_head",)}, {"targets": ("embed_tokens",)}, {"modules_to_save": ("lm_head",)}]
)
def test_a_tied_matrix_is_refused(tied, llama, fields):
    with pytest.raises(ModelError, match="E-LORA-TIED"):
        learner_of(tied, adapter=LoRA(rank=2, **fields))
    assert learner_of(llama, adapter=LoRA(rank=2, **fields))(row((5, 4))).item() > 0


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_alpha_over_rank_or_its_root(llama, rslora):
    learner = learner_of(llama, adapter=LoRA(rank=4, alpha=8.0, rslora=rslora))
    layer = learner.causal.base_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 32)
    right = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * (4.0 if rslora else 2.0)
    assert torch.allclose(layer(x) - layer.base_layer(x), right, atol=1e-5)


def trained(llama, folder, **fields):
    learner = learner_of(llama, adapter=LoRA(rank=4, **fields))
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.normal_(std=0.1)
    learner.save(folder)
    return learner


@pytest.mark.parametrize("quant", [None, NF4()])
def test_an_adapter_goes_on_and_trains(llama, tmp_path, quant):
    first = trained(llama, tmp_path / "one")
    learner = learner_of(llama, adapter=LoRA(rank=4, start=str(tmp_path / "one")), quant=quant)
    assert learner.what_trains().trained == first.what_trains().trained > 0
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.trainable(), learner.trainable()))
    assert all(grad.norm() > 0 for grad in gradients(learner, row((9, 5)))[1].values())


def test_an_adapter_of_another_form_is_refused_field_by_field(llama, tmp_path):
    trained(llama, tmp_path / "one", targets=("q_proj", "v_proj"))
    start = str(tmp_path / "one")
    with pytest.raises(ModelError) as caught:
        learner_of(llama, adapter=LoRA(rank=8, alpha=1.0, rslora=True, start=start))
    found = [problem.what for problem in caught.value.problems]
    assert found == [f"the adapter to go on from has another {word}" for word in ("rank", "alpha", "rslora", "targets")]
    learner_of(llama, adapter=LoRA(rank=4, targets=("v_proj", "self_attn.q_proj"), start=start))


def test_an_adapter_of_another_base_is_told(llama, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(adapter, "warn", said.append)
    trained(llama, tmp_path / "one")
    learner_of(llama, adapter=LoRA(rank=4, start=str(tmp_path / "one")))
    assert said == []
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/another"}))
    learner_of(llama, adapter=LoRA(rank=4, start=str(tmp_path / "one")))
    assert len(said) == 1
    assert "org/another" in said[0]


@pytest.mark.parametrize("wrong", ["empty", "half", "nan", "gone", "no weights"])
def test_an_adapter_that_is_not_whole_is_refused(llama, tmp_path, wrong):
    trained(llama, tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    match wrong:
        case "empty":
            tensors = {}
        case "half":
            del tensors[name]
        case "nan":
            tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    if wrong == "gone":
        (tmp_path / "one" / "adapter_config.json").unlink()
    if wrong == "no weights":
        file.unlink()
    with pytest.raises(ModelError, match="E-LORA-START"):
        learner_of(llama, adapter=LoRA(rank=4, start=str(tmp_path / "one")))


def test_the_saved_config_is_what_was_asked_for(llama, tmp_path):
    trained(llama, tmp_path / "one", alpha=8.0, dropout=0.1, rslora=True)
    held = LoraConfig.from_pretrained(tmp_path / "one")
    assert (held.r, held.lora_alpha, held.lora_dropout, held.use_rslora) == (4, 8.0, 0.1, True)
    assert sorted(held.target_modules) == ALL
    assert held.base_model_name_or_path == str(llama.resolve())


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.2}, {"rslora": True}])
def test_no_float32_copy_of_a_layers_input_is_kept(llama, fields):
    """The copies change no bit of the loss; they only cost memory."""
    kept, losses = [], []
    for casts in (False, True):
        torch.manual_seed(0)
        learner = learner_of(llama, dtype="bfloat16", checkpointing=False, adapter=LoRA(rank=2, **fields))
        for module in learner.modules():
            if isinstance(module, adapter.LoraLayer):
                assert not module.cast_input_dtype_enabled
                module.cast_input_dtype_enabled = casts
        sizes = {}

        def hold(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = learner(row((40, 50)))
        loss.backward()
        kept.append(sum(sizes.values()))
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert kept[0] < kept[1] * 0.95
