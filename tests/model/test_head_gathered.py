"""A head's weight is whole in one call of its module a row, as ZeRO-3 and FSDP make it, and is read nowhere else."""

from __future__ import annotations

import copy
import pickle

import model_rig
import pytest
import rig
import torch
import torch.nn.functional as F
from model_rig import folder_of, gradients, row, worst
from torch import nn

from finetuner.config.model import LoRA
from finetuner.data.batch import IGNORED
from finetuner.model import causal_lm, head

LENGTHS = (9, 12, 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("llama"))


def learner_of(folder, **fields):
    """The same one each time: adapters start at random."""
    torch.manual_seed(0)
    return model_rig.learner_of(folder, **fields)


class Sharded:
    """A stand-in for an engine that shards: outside of the module's call there is `away` where the weight was."""

    def __init__(self, layer: nn.Module, away) -> None:
        self.layer, self.away, self.gathered = layer, away, 0
        self.whole = layer.weight.data
        layer.weight.data = away(self.whole)
        layer.register_forward_pre_hook(self.gather)
        layer.register_forward_hook(self.free)

    def gather(self, *_):
        self.gathered += 1
        self.layer.weight.data = self.whole

    def free(self, *_):
        self.layer.weight.data = self.away(self.whole)


def nothing(whole):
    return whole.new_empty(0)


def poison(whole):
    """Whoever reads it computes no number."""
    return torch.full_like(whole, float("nan"))


FROZEN = {"adapter": LoRA(rank=4)}


@pytest.mark.parametrize("piece", [3, 4096])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("method", "away"), [(FROZEN, nothing), (FROZEN, poison), ({}, poison)])
def test_a_sharded_head_is_gathered_once_a_row(llama, method, away, each, piece, monkeypatch):
    monkeypatch.setattr(head, "rows", lambda vocabulary: piece)
    batch = row(LENGTHS)
    plain, learner = learner_of(llama, **method), learner_of(llama, **method)
    shard = Sharded(learner.causal.lm_head, away)
    results = []
    for one in (plain, learner):
        result = one.log_probs(batch) if each else one(batch)
        if each and not method and one is learner:
            shard.gather()  # the weight learns from places with weights of their own: it is needed in both passes
        result.sum().backward()
        results.append((result, {name: parameter.grad for name, parameter in one.trainable()}))
    assert shard.gathered == (2 if each and not method else 1)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def by_calls(layer, hidden_ND, targets_N, dtype):
    return sum(F.cross_entropy(layer(h), y, reduction="sum") for h, y in zip(hidden_ND.split(3), targets_N.split(3)))


def from_outside(layer, hidden_ND, targets_N, dtype):
    return F.cross_entropy(hidden_ND @ layer.weight.t(), targets_N, reduction="sum")


@pytest.mark.parametrize(("wrong", "gathered"), [(by_calls, 4), (from_outside, 0)])
def test_a_head_that_is_called_for_each_piece_or_read_outside_would_be_seen(llama, wrong, gathered, monkeypatch):
    """The mutants."""
    learner = learner_of(llama, **FROZEN)
    shard = Sharded(learner.causal.lm_head, poison)
    monkeypatch.setattr(causal_lm, "loss_sum", wrong)
    loss = learner(row(LENGTHS))
    assert shard.gathered == gathered
    assert torch.isfinite(loss) == (gathered > 0)


METHODS = {
    "full": {},
    "lora": FROZEN,
    "adapter on the head": {"adapter": LoRA(rank=4, targets=("q_proj", "lm_head"))},
    "head whole": {"adapter": LoRA(rank=4, targets=("q_proj",), modules_to_save=("lm_head",))},
    "new rows": {"adapter": LoRA(rank=4), "new_tokens": ("<|new|>",)},
}


TIED = ("full", "lora", "new rows")
"""A tied head is trained with its embedding or not at all."""


@pytest.mark.parametrize(("method", "tied"), [*((name, False) for name in METHODS), *((name, True) for name in TIED)])
def test_the_head_is_called_once_whatever_it_is(tmp_path, method, tied, monkeypatch):
    monkeypatch.setattr(head, "rows", lambda vocabulary: 4)
    folder = rig.tiny_llama(tmp_path, tie_word_embeddings=tied)
    learner, batch = learner_of(folder, **METHODS[method]), row(LENGTHS)
    calls = []
    own = learner.causal.get_output_embeddings()
    own.register_forward_hook(lambda *_: calls.append(1))
    loss, grads = gradients(learner, batch)
    assert len(calls) == 1
    truth, true_grads = whole_logits(learner_of(folder, **METHODS[method]), batch)
    assert loss == pytest.approx(truth, rel=1e-5)
    live = {name for name, grad in true_grads.items() if grad.norm() > 1e-9}
    assert worst({name: grads[name] for name in live}, {name: true_grads[name] for name in live}) <= 1e-5


def whole_logits(learner, batch):
    """The oracle: logits of every place, by transformers' own forward."""
    logits_TV = learner.causal(**learner.inputs(batch.tokens_1T, batch)).logits[0]
    loss = F.cross_entropy(logits_TV, batch.targets_1T[0], ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in learner.trainable()}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("method", [{}, FROZEN])
def test_a_learner_gives_a_log_probability_for_each_learned_place_in_order(tmp_path, kind, method):
    """gemma2's head is no plain one: its logits are capped."""
    learner, batch = learner_of(folder_of(kind, tmp_path), **method), row(LENGTHS)
    values_N = learner.log_probs(batch)
    logits_TV = learner.causal(**learner.inputs(batch.tokens_1T, batch)).logits[0]
    places = (batch.targets_1T[0] != IGNORED).nonzero()[:, 0]
    true_N = logits_TV.log_softmax(-1)[places, batch.targets_1T[0, places]]
    torch.testing.assert_close(values_N, true_N, rtol=1e-5, atol=1e-5)
    assert values_N.dtype == torch.float32
    assert -values_N.sum().item() == pytest.approx(learner(batch).item(), rel=1e-5)
    assert not torch.allclose(values_N, true_N.flip(0), atol=1e-3), "the order is seen"
    none = learner.log_probs(row(LENGTHS, learned=False))
    assert none.shape == (0,)
    none.sum().backward()


def test_a_bound_head_gives_logits_is_copied_pickled_and_saved_as_before(llama, tmp_path):
    learner = learner_of(llama)
    learner(row(LENGTHS))
    own, hidden = learner.causal.lm_head, torch.randn(3, 32)
    assert torch.equal(own(hidden), F.linear(hidden, own.weight))
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        with torch.no_grad():
            twin.weight.zero_()
        assert not twin(hidden).any(), "it reads its own weight"
        assert head.loss_sum(twin, hidden, torch.tensor([1, 2, 3]), torch.float32).item() == pytest.approx(
            3 * torch.tensor(float(len(twin.weight))).log().item(), rel=1e-5
        )
    learner.save(tmp_path)
    from transformers import AutoModelForCausalLM

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, own.weight)


def test_a_head_is_bound_once():
    layer = nn.Linear(4, 5)
    head.bind(layer)
    bound = layer.forward
    head.bind(layer)
    assert layer.forward is bound


def test_a_piece_of_the_logits_is_half_a_gibibyte_at_the_most():
    for vocabulary in (2, 400, 32_000, 151_936, 262_144, 1 << 28):
        assert 1 <= head.rows(vocabulary) <= 4096
        assert head.rows(vocabulary) * vocabulary * 4 <= 1 << 29 or head.rows(vocabulary) == 1
