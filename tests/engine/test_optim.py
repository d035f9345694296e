"""Each trained parameter is in one group, with the decay of its kind and the rate of its part."""

import pytest
import torch
from torch import nn

from finetuner import AdamW
from finetuner.engine.optim import build_optimizer, groups
from finetuner.errors import ConfigError


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
