"""The arithmetic of the dial, against a count of each possibility."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuner.model import room
from finetuner.model.room import Kept, fewest, grown, held

SIZES = st.integers(0, 10**12)
LAYERS = st.lists(st.tuples(SIZES, SIZES).map(lambda pair: Kept(max(pair), min(pair))), min_size=1, max_size=12)


def peak(layers, count, head):
    """The oracle: goes through the layers one by one."""
    total = 0
    for number, layer in enumerate(layers):
        total += layer.checkpointed if number < count else layer.plain
    return total + sorted(layer.plain for layer in layers)[-1] + head


@given(LAYERS, SIZES, SIZES)
def test_the_choice_is_the_first_that_fits(layers, space, head):
    count = fewest(layers, space, head)
    fitting = [k for k in range(len(layers) + 1) if peak(layers, k, head) <= space]
    assert count == (fitting[0] if fitting else len(layers))


@given(LAYERS, SIZES, SIZES, SIZES)
def test_more_memory_never_means_more_layers(layers, space, more, head):
    assert fewest(layers, space + more, head) <= fewest(layers, space, head)


@given(LAYERS, SIZES)
def test_all_fits_none_fits(layers, head):
    assert fewest(layers, held(layers, 0, head), head) == 0
    assert fewest(layers, -1, head) == len(layers)
    assert all(held(layers, k + 1, head) <= held(layers, k, head) for k in range(len(layers)))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**3), st.integers(1, 1000))
def test_what_grows_is_foretold_without_its_constant(constant, slope, bend, times):
    sizes = [constant + slope * unit + bend * unit * unit for unit in (1, 2, 3)]
    assert grown(*sizes, times=times) == slope * times + bend * times * times


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(room, "available", lambda: 900)
    monkeypatch.setattr(room, "world", lambda: 3)
    assert room.free_bytes(torch.device("cpu")) == 300
    monkeypatch.setattr(room, "available", lambda: None)
    assert room.free_bytes(torch.device("cpu")) is None


def test_what_the_allocator_of_a_gpu_holds_unused_is_free(monkeypatch):
    for name, value in (("memory_reserved", 50), ("memory_allocated", 20), ("mem_get_info", (100, 1000))):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert room.free_bytes(torch.device("cuda", 0)) == 130
