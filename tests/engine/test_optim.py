"""Each trained parameter is in one group, with the decay of its kind and the rate of its part."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner import AdamW, BatchSize, CausalLM, Dialogues, Json, LoRA, Run, Steps
from finetuner.engine import optim as optim_module
from finetuner.engine.optim import build_optimizer, by_bitsandbytes, check_optimizer, groups
from finetuner.engine.restore import load_state, load_weights
from finetuner.engine.state import save_state
from finetuner.errors import CheckpointError, ConfigError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.lin = nn.Linear(4, 3)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def table(model, optim):
    return {name: (g.rate, g.decay) for g in groups(model, trainable(model), optim) for name, _ in g.named}


def test_norms_biases_and_embeddings_do_not_decay():
    got = table(Small(), AdamW(lr=1e-3, weight_decay=0.1))
    assert got == {
        "embed.weight": (1e-3, 0.0),
        "norm.weight": (1e-3, 0.0),
        "norm.bias": (1e-3, 0.0),
        "lin.weight": (1e-3, 0.1),
        "lin.bias": (1e-3, 0.0),
    }


def test_a_part_learns_at_its_own_rate():
    got = table(Small(), AdamW(lr=1e-3, rates={"lin.*": 1e-5}))
    assert {name for name, (rate, _) in got.items() if rate == 1e-5} == {"lin.weight", "lin.bias"}


def test_a_pattern_that_matches_nothing_is_told():
    with pytest.raises(ConfigError, match="E-OPTIM-RATES"):
        table(Small(), AdamW(lr=1e-3, rates={"projector.*": 1e-5}))


def test_frozen_weights_stay_bit_equal_under_decay_and_small_updates_arrive():
    model = Small()
    before = model.frozen.weight.clone()
    optim = AdamW(lr=1e-5, weight_decay=0.1)
    optimizer = build_optimizer(groups(model, trainable(model), optim), optim, torch.device("cpu"))
    with torch.no_grad():
        model.lin.bias.fill_(1.0)
    for _ in range(1000):
        model.lin.bias.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(model.frozen.weight, before)
    assert model.lin.bias.tolist() == pytest.approx([0.99] * 3, rel=1e-3)


def test_the_state_is_kept_by_name():
    model = Small()
    optim = AdamW(lr=1e-3)
    optimizer = build_optimizer(groups(model, trainable(model), optim), optim, torch.device("cpu"))
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in trainable(model))


def test_eight_bits_without_cuda_are_refused():
    model = Small()
    optim = AdamW(lr=1e-3, bits=8)
    with pytest.raises(ConfigError, match="E-OPTIM-8BIT"):
        build_optimizer(groups(model, trainable(model), optim), optim, torch.device("cpu"))


class Adapted(nn.Module):
    """Names as peft gives them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleDict({
            "lora_A": nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)}),
        })  # fmt: skip
        self.lm_head = nn.Linear(3, 5, bias=False)


def test_lora_plus_gives_b_matrices_their_greater_rate_and_a_pattern_counts_first():
    got = table(Adapted(), AdamW(lr=1e-4, lora_plus=16, rates={"lm_head.*": 1e-5}))
    assert got == {
        "layer.lora_A.default.weight": (1e-4, 0.0),
        "layer.lora_B.default.weight": (16e-4, 0.0),
        "lm_head.weight": (1e-5, 0.0),
    }
    named = table(Adapted(), AdamW(lr=1e-4, lora_plus=16, rates={"*lora_B*": 2e-4}))
    assert named["layer.lora_B.default.weight"] == (2e-4, 0.0)
    plain = table(Adapted(), AdamW(lr=1e-4))
    assert {rate for rate, _ in plain.values()} == {1e-4}


def test_lora_plus_costs_one_group_and_its_step_is_adams_at_each_rate():
    """The oracle writes Adam's first step out: with its corrections the moments cancel to the gradient's sign."""
    model, optim = Adapted(), AdamW(lr=1e-3, lora_plus=8, eps=1e-12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(groups(model, trainable(model), optim), optim, torch.device("cpu"))
    assert len(optimizer.param_groups) == 2
    for _, parameter in trainable(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 8e-3 if "lora_B" in name else 1e-3
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad.sign())


def test_the_check_sees_a_rate_that_the_a_matrices_get(monkeypatch):
    monkeypatch.setattr(optim_module, "rate_of", lambda name, optim: optim.lr * (optim.lora_plus or 1))
    with pytest.raises(AssertionError):
        test_lora_plus_costs_one_group_and_its_step_is_adams_at_each_rate()


def test_lora_plus_without_an_adapter_is_refused():
    parts = {"data": Dialogues(Json("x")), "batch": BatchSize(8), "until": Steps(1)}
    optim = AdamW(lr=1e-4, lora_plus=16)
    with pytest.raises(ConfigError, match="E-OPTIM-PLUS"):
        Run(model=CausalLM("x"), optim=optim, **parts)
    Run(model=CausalLM("x", adapter=LoRA()), optim=optim, **parts)


@pytest.mark.parametrize(("fields", "code"), [({"bits": 8}, "E-OPTIM-8BIT"), ({"paged": True}, "E-OPTIM-PAGED")])
def test_what_bitsandbytes_does_on_a_gpu_only_is_refused_elsewhere(fields, code):
    with pytest.raises(ConfigError, match=code):
        check_optimizer(AdamW(lr=1e-3, **fields), torch.device("cpu"))
    check_optimizer(AdamW(lr=1e-3), torch.device("cpu"))


def test_a_missing_bitsandbytes_is_told_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(optim_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"finetuner\[quant\]"):
        check_optimizer(AdamW(lr=1e-3, paged=True), torch.device("cuda"))


class Large(nn.Module):
    """Parameters of more and of less than the 4,096 weights from which bitsandbytes packs moments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)


def learn(model, optimizer, seed):
    torch.manual_seed(seed)
    for _, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def packed(model, **fields):
    optim = AdamW(lr=1e-2, weight_decay=0.1, **fields)
    return by_bitsandbytes(groups(model, trainable(model), optim), optim)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("fields", [{"bits": 8}, {"bits": 8, "paged": True}, {"paged": True}], ids=str)
def test_bitsandbytes_moments_come_back_by_name_and_bit_for_bit(fields, tmp_path):
    """Through the real optimizer, which steps on a CPU too, if slowly."""
    one, other = Large(), Large()
    left, right = packed(one, **fields), packed(other, **fields)
    learn(one, left, 1)
    save_state(tmp_path, left, dict(one.named_parameters()))
    load_state(tmp_path, right)
    load_weights(tmp_path, dict(other.named_parameters()))
    moments = [left.state[p]["state1"].dtype for _, p in one.named_parameters()]
    assert (torch.uint8 in moments) == ("bits" in fields)
    assert torch.float32 in moments
    for seed in (2, 3):
        learn(one, left, seed)
        learn(other, right, seed)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_paged_moments_come_back_into_pages(tmp_path, monkeypatch):
    """A page is asked of the optimizer for each moment, of its own dtype, and is what it steps on."""
    model = Large()
    optimizer = packed(model, bits=8, paged=True)
    learn(model, optimizer, 1)
    save_state(tmp_path, optimizer, dict(model.named_parameters()))
    again, pages = packed(model, bits=8, paged=True), []

    def page(parameter, dtype):
        pages.append(torch.full(parameter.shape, 7, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(again, "get_state_buffer", page)
    load_state(tmp_path, again)
    held = [again.state[p][key] for p in model.parameters() for key in ("state1", "state2")]
    assert {id(moment) for moment in held} == {id(moment) for moment in pages}
    assert all(
        torch.equal(again.state[p][key], optimizer.state[p][key]) for p in model.parameters() for key in ("state1",)
    )


def test_a_packed_parameter_that_lost_a_state_is_refused(tmp_path):
    model = Large()
    model.more = nn.Linear(128, 64, bias=False)
    optimizer = packed(model, bits=8)
    learn(model, optimizer, 1)
    save_state(tmp_path, optimizer, dict(model.named_parameters()))
    tensors, body = load_file(tmp_path / "optimizer.safetensors"), json.loads((tmp_path / "state.json").read_text())
    del tensors["absmax1/lin.weight"]
    body["parameters"]["lin.weight"]["states"].remove("absmax1")
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="E-STATE-NAMES"):
        load_state(tmp_path, packed(model, bits=8))
