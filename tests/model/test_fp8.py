"""8-bit products are taken where the hardware takes them, or refused before a weight is read."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import rig
import torch
from model_rig import CPU, learner_of, row
from torch import nn

from finetuner import NF4, CausalLM, LoRA
from finetuner.errors import ConfigError, ModelError
from finetuner.model import fp8
from finetuner.model.fp8 import check_fp8, use_fp8

CUDA = torch.device("cuda")


class Converted(nn.Linear):
    """Stands for torchao's layer; it shares the weight of the one that it replaces."""


@pytest.fixture
def torchao(monkeypatch):
    """A stand-in for torchao's conversion; gives the configs that it was called with."""
    called = []

    def convert(module, *, module_filter_fn, config):
        called.append(config)
        for parent_name, parent in list(module.named_modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and module_filter_fn(child, f"{parent_name}.{name}"):
                    made = Converted(child.in_features, child.out_features, bias=False, device="meta")
                    made.weight = child.weight
                    setattr(parent, name, made)
        return module

    module = ModuleType("torchao.float8")
    module.convert_to_float8_training = convert
    module.Float8LinearConfig = type("Config", (), {"from_recipe_name": staticmethod(lambda name: name)})
    package = ModuleType("torchao")
    package.__spec__ = ModuleSpec("torchao", None)  # peft asks whether the package is there
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", module)
    return called


@pytest.fixture
def llama(tmp_path):
    return rig.tiny_llama(tmp_path)


def card(monkeypatch, capability):
    """Lets torch see a GPU of that capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def asked(llama):
    return CausalLM(str(llama), fp8=True, compile=True)


def test_a_cpu_and_a_gpu_before_hopper_are_refused(llama, monkeypatch):
    with pytest.raises(ConfigError, match="E-FP8-DEVICE"):
        check_fp8(asked(llama), CPU, 64)
    card(monkeypatch, (8, 9))
    with pytest.raises(ConfigError, match=r"E-FP8-DEVICE[\s\S]*8\.9"):
        check_fp8(asked(llama), CUDA, 64)
    check_fp8(CausalLM(str(llama)), CPU, 64)


def test_rows_that_do_not_divide_and_a_missing_package_are_refused(llama, monkeypatch):
    card(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match="E-FP8-ROW"):
        check_fp8(asked(llama), CUDA, 1000)
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"finetuner\[fp8\]"):
        check_fp8(asked(llama), CUDA, 1024)
    monkeypatch.setattr(fp8, "find_spec", lambda name: name)
    check_fp8(asked(llama), CUDA, 1024)


@pytest.mark.parametrize(
    "fields", [{"quant": NF4(), "adapter": LoRA()}, {"dtype": "float32"}, {"compile": False}], ids=str
)
def test_what_fp8_does_not_go_with_is_refused_in_the_config(fields):
    with pytest.raises(ConfigError, match="E-FP8"):
        CausalLM("x", **{"fp8": True, "compile": True} | fields)


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)])
def test_the_decoders_layers_are_converted_and_head_and_adapters_are_not(llama, torchao, monkeypatch, adapter):
    monkeypatch.setattr(fp8, "check_fp8", lambda *given: None)
    monkeypatch.setattr("finetuner.model.compiled.check_compile", lambda *given: None)
    monkeypatch.setattr("finetuner.model.causal_lm.CausalLearner.compile_for", lambda *given: None)
    from finetuner.model.build import build

    model = CausalLM(str(llama), adapter=adapter, fp8=True, compile=True)
    learner = build(model, CPU, dialogues=True, tokens=64).learner
    assert torchao == ["rowwise"], "a scale for each token, or documents would see each other's size"
    kinds = {name: type(module) for name, module in learner.named_modules() if isinstance(module, nn.Linear)}
    converted = {name for name, kind in kinds.items() if kind is Converted}
    assert len(converted) == 2 * 7
    assert not any("lm_head" in name or "lora_" in name for name in converted)
    assert any("lora_" in name for name in kinds) == (adapter is not None)
    loss = learner(row((4, 5)))
    loss.backward()
    assert loss.isfinite()
    assert len(learner.trainable()) == len({id(parameter) for _, parameter in learner.trainable()})


def test_layers_of_other_sizes_stay_and_a_model_of_none_is_refused(tmp_path, torchao):
    odd = rig.tiny_llama(tmp_path / "odd", hidden_size=40, intermediate_size=72, head_dim=10)
    with pytest.raises(ModelError, match="E-FP8-NONE"):
        use_fp8(learner_of(odd).causal)
    assert not torchao
    mixed = rig.tiny_llama(tmp_path / "mixed", hidden_size=32, intermediate_size=72)
    causal = learner_of(mixed).causal
    use_fp8(causal)
    layer = causal.base_model.layers[0]
    assert type(layer.mlp.up_proj) is nn.Linear
    assert type(layer.self_attn.q_proj) is Converted
