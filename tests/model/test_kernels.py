"""Liger's kernels go into a model that they are made for, or are refused before a weight is read."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import rig
import torch
from model_rig import CPU, learner_of, row

from finetuner import CausalLM, Fresh
from finetuner.errors import ConfigError, ModelError
from finetuner.model import kernels
from finetuner.model.kernels import check_kernels, family, use_kernels

CUDA = torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel that knows llama only; gives what it was called with."""
    called = []
    module, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    module._apply_liger_kernel_to_instance = lambda **given: called.append(given)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    return called


@pytest.fixture
def llama(tmp_path):
    return rig.tiny_llama(tmp_path)


def test_a_cpu_has_no_such_kernels(llama):
    with pytest.raises(ConfigError, match="E-KERNELS-DEVICE"):
        check_kernels(CausalLM(str(llama), kernels="liger"), CPU)
    check_kernels(CausalLM(str(llama)), CPU)


def test_a_missing_package_is_told_with_the_extra_that_brings_it(llama, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"finetuner\[liger\]"):
        check_kernels(CausalLM(str(llama), kernels="liger"), CUDA)


def test_a_family_without_kernels_is_refused_and_one_with_them_is_not(llama, liger):
    check_kernels(CausalLM(str(llama), kernels="liger"), CUDA)
    fresh = Fresh({"model_type": "gpt2"}, str(llama))
    with pytest.raises(ModelError, match="E-KERNELS-FAMILY") as caught:
        check_kernels(CausalLM(fresh, kernels="liger"), CUDA)
    assert "llama" in str(caught.value)


def test_internlm2_is_the_llama_as_which_it_is_read(llama):
    text = (llama / "config.json").read_text()
    (llama / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "internlm2"'))
    assert family(CausalLM(str(llama))) == "llama"


def test_the_loss_stays_ours(llama, liger, monkeypatch):
    """A build on CUDA, as far as it goes on a CPU."""
    monkeypatch.setattr(kernels, "check_kernels", lambda model, device: None)
    learner = learner_of(llama, kernels="liger")
    (given,) = liger
    assert given == {"model": learner.causal, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert learner(row((4, 5))).isfinite()


def test_no_kernels_without_asking(llama, liger):
    learner_of(llama)
    assert not liger
    use_kernels(learner_of(llama).causal)
    assert len(liger) == 1
