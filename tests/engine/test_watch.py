"""A step that is not finite changes nothing, nor does any after it, however late the host learns of it."""

from __future__ import annotations

import math

import pytest
import torch

from finetuner.config.run import AdamW
from finetuner.engine.engine import NonFinite
from finetuner.engine.optim import Group, build_optimizer
from finetuner.engine.watch import Watch

CPU = torch.device("cpu")


def verdicts(watch: Watch, figures: list[tuple[float, float]]) -> tuple[int, NonFinite] | None:
    """At which step the watch spoke up, and what it said."""
    for step, (loss, norm) in enumerate(figures):
        try:
            watch.see(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
        except NonFinite as error:
            return step, error
    return None


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_the_first_step_is_named_after_the_lag(lag: int, bad: tuple[float, float]) -> None:
    told = verdicts(Watch(CPU, lag), [(1.0, 2.0), (1.5, 2.5), bad, (9.0, 9.0), (math.nan, 1.0), (8.0, 8.0)])
    assert told is not None
    step, error = told
    assert (step, error.step) == (2 + lag, 2)
    assert str((error.loss, error.norm)) == str(bad)


def test_finite_steps_are_let_pass() -> None:
    watch = Watch(CPU, 1)
    assert verdicts(watch, [(1.0, 2.0)] * 5) is None
    watch.read()


def test_what_is_unread_is_read_in_the_end() -> None:
    watch = Watch(CPU, 2)
    assert verdicts(watch, [(1.0, 1.0), (1.0, math.nan)]) is None
    with pytest.raises(NonFinite, match="step 1"):
        watch.read()


def trained(lag: int, given: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and moments after two good steps; after a bad one and two more that came before the host knew."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer = build_optimizer([Group(0.1, 0.0, (("w", weight),))], AdamW(lr=0.1), CPU)
    watch = Watch(CPU, lag)
    if given:
        optimizer.found_inf = watch.spoiled  # type: ignore[attr-defined]
    kept: list[list[torch.Tensor]] = []
    for step, scale in enumerate((1.0, 1.0, math.nan, 1.0, 1.0)):
        weight.grad = torch.randn(50) * scale
        watch.see(step, torch.tensor(1.0, dtype=torch.float64), weight.grad.norm())
        optimizer.step()
        if step in (1, 4):
            kept.append([weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())])
    return kept[0], kept[1]


def test_no_update_is_made_from_the_first_bad_step_on() -> None:
    good, late = trained(lag=9, given=True)
    assert all(torch.equal(one, other) for one, other in zip(good, late, strict=True))


def test_the_law_notices_an_optimizer_that_is_not_told() -> None:
    good, late = trained(lag=9, given=False)
    assert not torch.equal(good[0], late[0])
