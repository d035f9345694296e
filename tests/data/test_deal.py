"""Laws of dealing: each pack in one cell, as many cells for every rank, little waiting of one rank for another."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from finetuner.data import deal as deal_module
from finetuner.data import steps
from finetuner.data.deal import cost, deal
from finetuner.data.pack import pack

Dealt = list[list[tuple[int, ...]]]


def naive(costs: list[float], world: int, per_device: int) -> Dealt:
    """As they come: the first ranks' cells first."""
    count = -(-len(costs) // (world * per_device))
    starts = [[(index * world + rank) * per_device for index in range(count)] for rank in range(world)]
    return [[tuple(range(len(costs)))[start : start + per_device] for start in of_rank] for of_rank in starts]


def slowest_rank(dealt: Dealt, costs: list[float]) -> float:
    """What all ranks wait for at the end of a step."""
    return max(sum(costs[place] for cell in cells for place in cell) for cells in dealt)


def in_lockstep(dealt: Dealt, costs: list[float]) -> float:
    """What all ranks wait for where each micro-batch ends for all at once."""
    return sum(max(sum(costs[place] for place in cells[index]) for cells in dealt) for index in range(len(dealt[0])))


def best(costs: list[float], world: int, per_device: int) -> tuple[float, float]:
    """The least of both, over all dealings."""
    count = -(-len(costs) // (world * per_device))
    rank, lock = float("inf"), float("inf")
    for cells in product(range(world * count), repeat=len(costs)):
        held = np.bincount(cells, minlength=world * count)
        if held.max() <= per_device:
            sums = np.bincount(cells, weights=costs, minlength=world * count).reshape(count, world)
            rank, lock = min(rank, sums.sum(0).max()), min(lock, sums.max(1).sum())
    return rank, lock


def drawn(seed: int, number: int) -> list[float]:
    """Costs of full packs, of one long document or many short ones."""
    draw = np.random.default_rng(seed)
    cuts = [np.sort(draw.integers(1, 1 << 15, draw.integers(0, 6))) for _ in range(number)]
    return [cost(np.diff(np.array([0, *inner, 1 << 15]))) for inner in cuts]


SHAPES = [(2, 1, 6), (2, 1, 5), (2, 2, 6), (3, 1, 6), (2, 3, 6), (3, 2, 5), (3, 2, 2)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("world", "per_device", "number"), SHAPES)
def test_dealing_is_near_the_best_there_is(world: int, per_device: int, number: int, seed: int) -> None:
    costs = drawn(seed, number)
    dealt = deal(costs, world, per_device)
    rank, lock = best(costs, world, per_device)
    assert slowest_rank(dealt, costs) <= 1.12 * rank
    assert in_lockstep(dealt, costs) <= 1.05 * lock


@pytest.mark.parametrize("number", [1, 2, 5, 8, 63, 64])
@pytest.mark.parametrize(("world", "per_device"), [(1, 1), (1, 4), (2, 1), (3, 2), (8, 1), (8, 4)])
def test_each_pack_lies_in_one_cell_and_no_cell_is_empty_that_need_not_be(
    world: int, per_device: int, number: int
) -> None:
    dealt = deal(drawn(number, number), world, per_device)
    cells = [cell for of_rank in dealt for cell in of_rank]
    assert sorted(place for cell in cells for place in cell) == list(range(number))
    assert {len(of_rank) for of_rank in dealt} == {-(-number // (world * per_device))}
    assert max(len(cell) for cell in cells) <= per_device
    assert sum(not cell for cell in cells) == max(0, len(cells) - number)
    assert dealt == deal(drawn(number, number), world, per_device)


def waiting(way: Any, capacity: int, world: int, per_device: int, total: int) -> tuple[float, float]:
    """Mean over steps of the share of a rank's work that it waits, at the step's end and in lockstep."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(7, 1.6, 6000).astype(int), 1, capacity)
    members, bounds = pack(lengths, capacity)
    costs = [cost(lengths[members[a:b]]) for a, b in pairwise(bounds)]
    order, waits = draw.permutation(len(costs)), []
    for start in range(0, len(order) - total, total):
        own = [costs[place] for place in order[start : start + total]]
        dealt = way(own, world, per_device)
        waits.append([measure(dealt, own) * world / sum(own) - 1 for measure in (slowest_rank, in_lockstep)])
    rank, lock = np.mean(waits, 0).tolist()
    return rank, lock


@pytest.mark.parametrize(("world", "per_device", "total"), [(2, 1, 16), (4, 1, 16), (4, 2, 32), (8, 1, 64)])
def test_ranks_wait_far_less_than_when_packs_are_dealt_as_they_come(world: int, per_device: int, total: int) -> None:
    slow, fast = (waiting(way, 1 << 15, world, per_device, total) for way in (naive, deal))
    assert fast[0] <= slow[0] / 3
    assert fast[1] <= slow[1] / 3


def test_a_dealer_that_does_not_look_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law above: cells are filled, and taken, as packs come."""
    monkeypatch.setattr(deal_module, "sorted", lambda things, key=None: list(things), raising=False)
    with pytest.raises(AssertionError):
        test_ranks_wait_far_less_than_when_packs_are_dealt_as_they_come(4, 1, 16)


def test_a_cost_of_tokens_alone_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the cost: full packs cost the same, whatever is in them."""
    monkeypatch.setattr(deal_module, "PAIR", 0.0)
    with pytest.raises(AssertionError):
        test_a_long_document_costs_its_square()


def test_a_long_document_costs_its_square() -> None:
    one, many = cost(np.array([1 << 17])), cost(np.full(1 << 7, 1 << 10))
    assert one == pytest.approx((1 << 17) * (1 + (1 << 17) / (12 * 4096)))
    assert one > 3 * many > 3 * (1 << 17)


def test_steps_are_dealt_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan hands the costs on: with others, other packs come together."""
    from test_steps import plan

    made = plan(97, 8)
    right = [made.micro_batches(step, 0, 2, 1) for step in range(12)]
    monkeypatch.setattr(steps, "cost", lambda lengths: 1.0)
    assert right != [made.micro_batches(step, 0, 2, 1) for step in range(12)]
