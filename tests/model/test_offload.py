"""Inputs of checkpointed layers leave for the host and come back bit for bit, one layer ahead of the backward pass.

A lane of CPU tensors stands in for the GPU's: a copy is done only when the computation has waited for it, so that
what is read or given back too early is garbage.
"""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import rig
import torch
from model_rig import gradients, learner_of, row
from torch.utils.checkpoint import checkpoint

from finetuner.config.model import CausalLM, LoRA
from finetuner.errors import ConfigError
from finetuner.model import layers, offload
from finetuner.model.offload import LEAVING, Host, offloaded

LAYERS = 5


class SlowLane:
    """Copies when it is waited for, in their order; keeps a diary."""

    def __init__(self):
        self.diary, self.pending, self.aboard = [], [], []

    def out(self, tensor):
        self.diary.append("out")
        self.aboard = [ref for ref in self.aboard if ref() is not None] + [weakref.ref(tensor)]
        held = torch.full_like(tensor, torch.nan)
        return held, self.copy(held, tensor)

    def back(self, held):
        self.diary.append("back")
        tensor = torch.full_like(held, torch.nan)
        return tensor, self.copy(tensor, held)

    def copy(self, into, source):
        weak = weakref.ref(source)  # the lane keeps no memory alive: who asks for a copy must
        self.pending.append((into, weak))
        return len(self.pending) - 1

    def wait(self, done):
        self.diary.append("wait")
        for number in range(done + 1):
            if self.pending[number] is not None:
                into, weak = self.pending[number]
                source = weak()
                assert source is not None, "memory was given back before its copy was done"
                into.copy_(source)
                self.pending[number] = None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("offload"), num_hidden_layers=LAYERS)


def learner_with(folder, lane, count=LAYERS, **fields):
    """A learner whose checkpointed layers offload through `lane`; without one they do not."""
    torch.manual_seed(1)
    learner = learner_of(folder, checkpointing=count, **fields)
    if lane is not None:
        recompute = partial(offloaded, Host(lane))
        for layer in layers.decoder_layers(learner.causal):
            layer._gradient_checkpointing_func = recompute
    torch.manual_seed(2)
    return learner


METHODS = {
    "full": {}, "bfloat16": {"dtype": "bfloat16"}, "tiled": {"tiled_mlp": 4},
    "lora": {"adapter": LoRA(rank=4, dropout=0.2), "neftune": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("count", [2, LAYERS])
@pytest.mark.parametrize("method", METHODS)
def test_offloading_changes_no_bit(llama, method, count):
    loss, grads = gradients(learner_with(llama, None, count, **METHODS[method]), row((9, 5)))
    lane = SlowLane()
    other_loss, other_grads = gradients(learner_with(llama, lane, count, **METHODS[method]), row((9, 5)))
    assert loss == other_loss
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    assert lane.diary.count("out") == lane.diary.count("back") == count


def test_two_rows_in_flight_and_a_row_that_is_dropped_change_nothing(llama):
    one, two = row((9, 5)), row((4, 12), seed=1)
    wanted = []
    for lane in (None, SlowLane()):
        learner = learner_with(llama, lane)
        first, second = learner(one), learner(two)
        dropped = learner(two)
        second.backward()
        del dropped
        first.backward()
        wanted.append({name: p.grad for name, p in learner.trainable()})
    assert all(torch.equal(wanted[0][name], wanted[1][name]) for name in wanted[0])


def test_a_layers_input_comes_while_the_next_one_recomputes(llama, monkeypatch):
    lane = SlowLane()
    learner = learner_with(llama, lane)
    loss = learner(row((9, 5)))
    assert lane.diary.count("out") == LAYERS
    assert "back" not in lane.diary
    recomputed = []

    def note(*_):
        recomputed.append(lane.diary.count("back"))

    for layer in layers.decoder_layers(learner.causal):
        layer.self_attn.register_forward_pre_hook(note)
    loss.backward()
    assert recomputed == [2, 3, 4, 5, 5], "that of the layer before is on its way"


def test_no_more_than_two_leave_at_a_time_and_none_stays(llama):
    lane, sizes = SlowLane(), []
    learner = learner_with(llama, lane)

    def note(*_):
        sizes.append(sum(ref() is not None for ref in lane.aboard))

    for layer in layers.decoder_layers(learner.causal)[1:]:
        layer.mlp.register_forward_pre_hook(note)
    loss = learner(row((9, 5)))
    assert max(sizes) <= LEAVING + 1, "those that leave, and the one that is computed with"
    loss.backward()
    assert not any(ref() is not None for ref in lane.aboard)


def test_the_lane_notices_a_copy_that_nobody_waits_for(llama, monkeypatch):
    real = SlowLane.wait
    monkeypatch.setattr(SlowLane, "wait", lambda self, done: None if "back" in self.diary else real(self, done))
    _, grads = gradients(learner_with(llama, None), row((9, 5)))
    _, other = gradients(learner_with(llama, SlowLane()), row((9, 5)))
    assert not all(torch.equal(grads[name], other[name]) for name in grads)


def test_the_lane_notices_memory_that_is_given_back_too_early(llama, monkeypatch):
    monkeypatch.setattr(Host, "_settle", lambda self, count: self._leaving.clear())
    loss = learner_with(llama, SlowLane())(row((9, 5)))
    monkeypatch.setattr(offload.Parcel, "__del__", lambda self: None)
    with pytest.raises(AssertionError, match="memory was given back"):
        loss.backward()


def test_what_is_saved_is_the_input_alone(llama, monkeypatch):
    shapes = []
    real = Host.pack
    monkeypatch.setattr(offload.Host, "pack", lambda self, x: shapes.append(tuple(x.shape)) or real(self, x))
    learner_with(llama, SlowLane())(row((9, 5)))
    assert shapes == [(1, 14, 32)] * LAYERS
    assert checkpoint is offload.checkpoint


def test_offload_without_checkpointing_is_refused():
    for choice in (False, 0):
        with pytest.raises(ConfigError, match="E-OFFLOAD"):
            CausalLM("m", checkpointing=choice, offload=True)
    for choice in ("auto", True, 3):
        assert CausalLM("m", checkpointing=choice, offload=True)
