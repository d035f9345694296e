"""Copies hold what stood when they were taken, ties included, in memory that is fetched once."""

from __future__ import annotations

import pytest
import torch

from finetuner.engine import snapshot
from finetuner.engine.snapshot import Copies


def tensors():
    torch.manual_seed(0)
    tied = torch.randn(4, 3)
    return {"head": tied, "embed": tied.view(4, 3), "across": torch.randn(3, 5).T, "step": torch.tensor(3.0),
            "bytes": torch.arange(9, dtype=torch.uint8), "half": torch.randn(2, 2, dtype=torch.bfloat16)}  # fmt: skip


def test_a_copy_stays_when_the_original_goes_on():
    live = tensors()
    wanted = {name: tensor.tolist() for name, tensor in live.items()}
    taken = Copies().take(live)
    for tensor in live.values():
        tensor.add_(1)
    assert {name: tensor.tolist() for name, tensor in taken.items()} == wanted
    assert {name: tensor.dtype for name, tensor in taken.items()} == {name: t.dtype for name, t in live.items()}
    assert all(tensor.is_contiguous() for tensor in taken.values())


def test_what_is_tied_is_copied_once_and_stays_tied():
    taken = Copies().take(tensors())
    assert taken["head"].data_ptr() == taken["embed"].data_ptr()
    assert len({tensor.data_ptr() for tensor in taken.values()}) == 5


def test_the_second_snapshot_takes_the_memory_of_the_first():
    live, copies = tensors(), Copies()
    assert copies.needs(live) == 4 * 12 + 4 * 15 + 4 + 9 + 2 * 4
    first = {name: tensor.data_ptr() for name, tensor in copies.take(live).items()}
    live["half"].add_(1)
    assert copies.needs(live) == 0
    second = copies.take(live)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == first
    assert torch.equal(second["half"], live["half"])
    live["half"] = torch.zeros(3, 3)
    assert copies.needs(live) == 36
    assert torch.equal(copies.take(live)["half"], live["half"])


@pytest.mark.parametrize(("free", "fits"), [(None, True), (1000, True), (130, False)])
def test_copies_leave_some_memory_free(free, fits, monkeypatch):
    monkeypatch.setattr(snapshot, "available", lambda: free)
    assert Copies().fits(tensors()) == fits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_copies_are_pinned_and_there_when_take_returns():
    live = {name: torch.randn(2000, 2000, device="cuda") for name in "ab"}
    for _ in range(3):
        live["a"] = live["a"] @ live["b"]
        live["a"] /= live["a"].norm()
    copies = Copies()
    taken = copies.take(live)
    wanted = {name: tensor.clone() for name, tensor in taken.items()}
    live["a"].zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(taken[name], wanted[name]) for name in live)
    assert all(tensor.is_pinned() for tensor in taken.values())
    assert copies.needs(live) == 0
