"""Laws of the order: a pure function of the step, each pack once an epoch, the same on any number of ranks."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetuner.config.run import BatchSize, Epochs, Steps
from finetuner.data import steps as steps_module
from finetuner.data.order import permutation
from finetuner.data.steps import Plan, accumulation
from finetuner.errors import ConfigError


class Counted(SimpleNamespace):
    """As many packs as wanted; pack k has k + 1 learned places, and a document of as many tokens."""

    def __len__(self) -> int:
        return len(self.learned)

    def lengths(self, pack: int) -> Any:
        return self.learned[pack : pack + 1]


def plan(packs: int, total: int, until: Steps | Epochs = Epochs(3), seed: int = 0) -> Plan:  # noqa: B008
    counted: Any = Counted(learned=np.arange(1, packs + 1))
    return Plan(counted, total, until, seed)


SIZES = [(1, 1), (1, 8), (7, 2), (8, 4), (97, 8), (97, 97), (5, 100)]


@pytest.mark.parametrize(("packs", "total"), SIZES)
def test_each_epoch_takes_every_pack_once(packs: int, total: int) -> None:
    made = plan(packs, total)
    assert made.steps_per_epoch == math.ceil(packs / total)
    assert made.steps == 3 * made.steps_per_epoch
    orders = []
    for epoch in range(3):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        assert {made.epoch(step) for step in steps} == {epoch}
        order = [row for step in steps for row in made.rows(step)]
        assert sorted(order) == list(range(packs))
        assert all(len(made.rows(step)) == total for step in steps[:-1])
        orders.append(tuple(order))
    assert packs < 7 or len(set(orders)) == 3


@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("packs", "total"), SIZES)
def test_the_ranks_share_a_step_and_all_take_part(packs: int, total: int, world: int, per_device: int) -> None:
    made = plan(packs, total)
    for step in range(made.steps):
        shares = [made.micro_batches(step, rank, world, per_device) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) >= 1
        assert sorted(row for share in shares for batch in share for row in batch) == sorted(made.rows(step))
        assert all(len(batch) <= per_device for share in shares for batch in share)
        assert made.learned(step) == sum(row + 1 for row in made.rows(step))


@pytest.mark.parametrize("per_device", [1, 2, 5])
def test_one_rank_takes_packs_as_they_come(per_device: int) -> None:
    made = plan(97, 8)
    for step in range(made.steps):
        taken = made.micro_batches(step, 0, 1, per_device)
        assert [row for batch in taken for row in batch] == list(made.rows(step))
        assert all(len(batch) == per_device for batch in taken[:-1])


def test_an_order_that_knows_the_rank_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law above: every rank takes the step's first packs."""
    right = Plan.micro_batches
    monkeypatch.setattr(Plan, "micro_batches", lambda self, step, rank, world, each: right(self, step, 0, world, each))
    with pytest.raises(AssertionError):
        test_the_ranks_share_a_step_and_all_take_part(97, 8, 2, 1)


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    wanted = [plan(97, 8).rows(step) for step in range(39)]
    one = plan(97, 8)
    for step in np.random.default_rng(0).permutation(39).tolist() * 2:
        assert one.rows(step) == wanted[step]


def test_an_order_with_a_memory_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law above: the order comes from a generator that goes on."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr(steps_module, "permutation", lambda seed, epoch, n: draw.permutation(n))
    with pytest.raises(AssertionError):
        test_a_step_is_the_same_whatever_was_asked_before()


def test_a_million_packs_resume_at_once() -> None:
    made = plan(1_000_000, 8)
    start = time.process_time()
    made.rows(made.steps * 9 // 10)
    assert time.process_time() - start < 5  # about 0.1 s


def test_the_order_never_changes_between_versions() -> None:
    """Written down: a run that is resumed after an upgrade must find its order again."""
    assert permutation(0, 0, 8).tolist() == PINNED[0]
    assert permutation(1, 2, 8).tolist() == PINNED[1]
    assert permutation(1, 2, 8, "pack").tolist() == PINNED[2]


PINNED = [[0, 2, 1, 5, 4, 3, 6, 7], [4, 2, 0, 6, 1, 5, 7, 3], [4, 5, 6, 7, 1, 0, 2, 3]]


def test_seeds_epochs_and_purposes_have_orders_of_their_own() -> None:
    orders = {
        tuple(permutation(seed, epoch, 20, purpose).tolist())
        for seed in (0, 1, 2**64 - 1)
        for epoch in (0, 1)
        for purpose in ("order", "pack", "hold-out", "mix")
    }
    assert len(orders) == 24
    assert not permutation(0, 0, 20).flags.writeable


@pytest.mark.parametrize(
    ("until", "steps"),
    [(Steps(7), 7), (Epochs(1), 100), (Epochs(0.07), 7), (Epochs(0.001), 1), (Epochs(2.5), 250), (Epochs(1.1), 110)],
)
def test_a_duration_is_a_number_of_steps(until: Steps | Epochs, steps: int) -> None:
    assert plan(100, 1, until).steps == steps


@pytest.mark.parametrize(("total", "per_device", "world", "times"), [(16, 1, 1, 16), (16, 2, 8, 1), (12, 2, 3, 2)])
def test_accumulation_follows_from_the_total_batch(total: int, per_device: int, world: int, times: int) -> None:
    assert accumulation(BatchSize(total, per_device), world) == times


@pytest.mark.parametrize(
    ("total", "per_device", "world", "fits"), [(16, 3, 1, "15, 18"), (4, 2, 4, "8"), (9, 2, 2, "8, 12")]
)
def test_a_batch_that_does_not_divide_names_those_that_do(total: int, per_device: int, world: int, fits: str) -> None:
    with pytest.raises(ConfigError, match="E-BATCH-DIVIDE") as caught:
        accumulation(BatchSize(total, per_device), world)
    assert caught.value.problems[0].fits.endswith(": " + fits)
