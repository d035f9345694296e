"""The optimizer's state comes back by name and bit for bit, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner.engine import restore
from finetuner.engine.restore import give, load_state, load_weights
from finetuner.engine.saved import open_state
from finetuner.engine.state import named_parameters, save_state
from finetuner.errors import CheckpointError


def model(order: str = "ab") -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in order})


def optimizer(of: nn.Module, **options: bool) -> torch.optim.Optimizer:
    named = list(of.named_parameters())
    groups = [{"params": named[:1], "weight_decay": 0.1}, {"params": named[1:]}]
    return torch.optim.AdamW(groups, lr=0.1, **options)


def step(of: nn.Module, optim: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for _, parameter in sorted(of.named_parameters()):
        parameter.grad = torch.randn(parameter.shape)
    optim.step()


def masters(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in of.named_parameters()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    learner = model()
    optim = optimizer(learner)
    step(learner, optim, 1)
    save_state(tmp_path, optim, masters(learner), {"step": 7})
    return tmp_path


def went_on(order: str, folder: Path) -> dict[str, torch.Tensor]:
    learner = model(order)
    optim = optimizer(learner)
    give(folder, load_state(folder, optim), masters(learner))
    step(learner, optim, 2)
    return masters(learner)


def unbroken() -> dict[str, torch.Tensor]:
    learner = model()
    optim = optimizer(learner)
    step(learner, optim, 1)
    step(learner, optim, 2)
    return masters(learner)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}])
def test_the_step_after_loading_equals_the_unbroken_one_to_the_bit(options: dict[str, bool], tmp_path: Path) -> None:
    left, right = model(), model()
    optim = optimizer(left, **options)
    step(left, optim, 1)
    save_state(tmp_path, optim, masters(left))
    step(left, optim, 2)
    other = optimizer(right, **options)
    load_weights(tmp_path, masters(right))
    load_state(tmp_path, other)
    step(right, other, 2)
    assert all(torch.equal(value, masters(right)[name]) for name, value in masters(left).items())


def test_state_follows_the_name_when_the_order_changes(saved: Path) -> None:
    before, moments = unbroken(), {}
    learner = model("ba")
    optim = optimizer(learner)
    load_state(saved, optim)
    for name, parameter, _ in named_parameters(optim):
        moments[name] = optim.state[parameter]["exp_avg"]
    assert all(torch.equal(load_file(saved / "optimizer.safetensors")[f"exp_avg/{n}"], m) for n, m in moments.items())
    assert all(torch.equal(value, went_on("ab", saved)[name]) for name, value in before.items())


def test_the_name_check_sees_matching_by_position(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_position(of: torch.optim.Optimizer) -> object:
        names = iter(["a.weight", "a.bias", "b.weight", "b.bias"])
        return ((next(names), parameter, group) for group in of.param_groups for parameter in group["params"])

    learner = model("ba")
    optim = optimizer(learner)
    monkeypatch.setattr(restore, "named_parameters", by_position)
    load_state(saved, optim)
    tensors = load_file(saved / "optimizer.safetensors")
    assert not torch.equal(optim.state[learner["b"].weight]["exp_avg"], tensors["exp_avg/b.weight"])


def test_numbers_come_back(saved: Path) -> None:
    assert open_state(saved).numbers == {"step": 7}


def test_a_state_before_the_first_step_is_empty_and_loads(tmp_path: Path) -> None:
    learner = model()
    save_state(tmp_path, optimizer(learner), masters(learner))
    other = optimizer(learner)
    load_state(tmp_path, other)
    assert not other.state


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "optimizer") -> None:
    tensors = load_file(folder / f"{file}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{file}.safetensors")


def renumber(folder: Path, change: Callable[[dict[str, dict[str, list[str]]]], object]) -> None:
    body = json.loads((folder / "state.json").read_text())
    change(body["parameters"])
    (folder / "state.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        (lambda f: rewrite(f, lambda t: t.pop("exp_avg/b.weight")), "E-STATE-NAMES", "exp_avg/b.weight"),
        (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), "E-STATE-NAMES", "unexpected x"),
        (lambda f: rewrite(f, lambda t: t.update({"exp_avg/a.bias": torch.ones(2)})), "E-STATE-SHAPE", "a.bias"),
        (lambda f: rewrite(f, lambda t: t["exp_avg/a.bias"].fill_(torch.nan)), "E-STATE-NONFINITE", "a.bias"),
        (lambda f: rewrite(f, lambda t: t.update({"exp_avg/a.bias": torch.ones(0)})), "E-STATE-EMPTY", "a.bias"),
        (lambda f: rewrite(f, lambda t: t["b.bias"].fill_(torch.inf), "masters"), "E-STATE-NONFINITE", "b.bias"),
        (lambda f: rewrite(f, lambda t: t.update({"module.a.bias": t.pop("a.bias")}), "masters"), "E-STATE-NAMES",
         "module.a.bias may be a.bias"),
        (lambda f: rewrite(f, lambda t: t.update({"a.bias": torch.ones(4)}), "masters"), "E-STATE-SHAPE", "a.bias"),
        (lambda f: renumber(f, lambda p: p.pop("a.bias")), "E-STATE-NAMES", "a.bias"),
        (lambda f: renumber(f, lambda p: p["a.bias"].update(shape=[9])), "E-STATE-SHAPE", "a.bias"),
        (lambda f: (f / "masters.safetensors").write_bytes(b"PK"), "E-STATE-FILE", "masters"),
        (lambda f: (f / "state.json").unlink(), "E-STATE-FILE", "state.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    change: Callable[[Path], object], code: str, names: str, saved: Path
) -> None:
    change(saved)
    learner = model()
    with pytest.raises(CheckpointError) as caught:
        give(saved, load_state(saved, optimizer(learner)), masters(learner))
    assert code in str(caught.value)
    assert names in str(caught.value)


def test_another_optimizer_is_refused(saved: Path) -> None:
    learner = model()
    with pytest.raises(CheckpointError, match="E-STATE-OPTIMIZER"):
        load_state(saved, torch.optim.SGD(list(learner.named_parameters()), lr=0.1))


def test_an_empty_or_broken_weight_is_never_written(tmp_path: Path) -> None:
    """A shard of ZeRO-3 in place of the weight has no numbers in it."""
    learner = model()
    for broken, code in ((torch.empty(0), "E-STATE-EMPTY"), (torch.tensor([torch.nan]), "E-STATE-NONFINITE")):
        with pytest.raises(CheckpointError, match=code):
            save_state(tmp_path, optimizer(learner), {"a.weight": broken})


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    learner = model()
    optim = optimizer(learner)
    step(learner, optim, 1)
    shared = torch.ones(4)
    for _, parameter, _ in named_parameters(optim):
        optim.state[parameter]["map"] = shared
    save_state(tmp_path, optim, masters(learner))
    load_state(tmp_path, optimizer(learner))
