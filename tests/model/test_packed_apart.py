"""Law 3 and the gradient of a packed row, for every attention that a config may choose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from model_rig import FAMILIES, folder_of, gradients, learner_of, oracle, row, worst

from finetuner.errors import ModelError
from finetuner.model import attention
from finetuner.model.causal_lm import CausalLearner

LENGTHS = (7, 9, 1, 5)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return folder_of(request.param, tmp_path_factory.mktemp(request.param))


def hidden(learner, batch):
    """The hidden states of a row, as `forward` makes them."""
    given = learner.inputs(batch.tokens_1T, batch)
    return learner.causal.base_model(**given).last_hidden_state


@pytest.mark.parametrize("choice", ["auto", "sdpa", "eager"])
def test_packed_rows_learn_what_documents_apart_learn(family, choice):
    if "gemma2" in str(family) and choice == "sdpa":
        with pytest.raises(ModelError, match="E-ATTENTION-UNFIT"):
            learner_of(family, attention=choice)
        return
    batch = row(LENGTHS)
    loss, grads = gradients(learner_of(family, attention=choice), batch)
    true_loss, true_grads = oracle(family, batch)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert worst(grads, true_grads) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_changing_a_document_moves_no_other_by_one_bit(family, choice, checkpointing, training):
    choice = "eager" if "gemma2" in str(family) and choice == "sdpa" else choice
    learner = learner_of(family, attention=choice, checkpointing=checkpointing).train(training)
    one, two = hidden(learner, row(LENGTHS)), hidden(learner, row(LENGTHS, other=0))
    assert torch.equal(one[:, 7:], two[:, 7:])
    assert not torch.equal(one[:, :7], two[:, :7]), "the change reached its own document"


def test_a_mask_of_ones_is_caught(family, monkeypatch):
    """The mutant: with a 2-D mask transformers no longer sees that a row is packed."""
    right = CausalLearner.inputs

    def wrong(self, tokens_1T, batch):
        return right(self, tokens_1T, batch) | {"attention_mask": torch.ones_like(tokens_1T)}

    learner = learner_of(family, attention="eager")
    monkeypatch.setattr(CausalLearner, "inputs", wrong)
    one, two = hidden(learner, row(LENGTHS)), hidden(learner, row(LENGTHS, other=0))
    assert not torch.equal(one[:, 7:], two[:, 7:])


def test_a_leaking_attention_is_refused_when_the_learner_is_made(tmp_path, monkeypatch):
    """The mutant: documents laid together as one."""
    family = folder_of("llama", tmp_path)
    together = attention.by_document

    def wrong(query, key, value, documents, window, scaling, dropout):
        return together(query, key, value, (sum(documents),), window, scaling, dropout)

    monkeypatch.setattr(attention, "by_document", wrong)
    with pytest.raises(ModelError, match="E-ATTENTION-LEAK"):
        learner_of(family)


def test_ours_serves_all_but_soft_capped_models(family):
    assert learner_of(family).attends == ("eager" if "gemma2" in str(family) else "finetuner")


def test_a_sliding_window_is_honoured(tmp_path, monkeypatch):
    folder = folder_of("mistral", tmp_path)
    batch = row((20,))
    true_loss, _ = oracle(folder, batch)
    assert learner_of(folder)(batch).item() == pytest.approx(true_loss, rel=1e-5)
    monkeypatch.setattr(attention, "band", lambda length, window, device: torch.ones(length, length).tril().bool())
    assert learner_of(folder)(batch).item() != pytest.approx(true_loss, rel=1e-4), "the mutant sees too far"


def test_flash_attention_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="E-ATTENTION-MISSING"):
        learner_of(tmp_path, attention="flash_attention_2")


def test_half_precision_packs_apart_too(tmp_path):
    learner = learner_of(folder_of("llama", tmp_path), dtype="bfloat16")
    with learner.autocast():
        one, two = hidden(learner, row(LENGTHS)), hidden(learner, row(LENGTHS, other=1))
    assert torch.equal(one[:, :7], two[:, :7])
    assert torch.equal(one[:, 16:], two[:, 16:])
    assert not torch.equal(one[:, 7:16], two[:, 7:16])


def test_the_kernel_gets_borders_and_windows(monkeypatch):
    """On a GPU; here a stand-in for the kernel, in torch's two forms of it, is asked instead."""
    import torch.nn.attention.varlen as varlen

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 10, 8) for heads in (4, 2, 2))
    documents, window = (6, 4), 3

    def with_groups(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa
        assert (max_q, max_k) == (6, 6)
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, 6, 10]
        return stand_in(query, key, value, cu_seq_q.tolist(), scale, window_size)

    def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert query.shape[1] == key.shape[1]
        return stand_in(query, key, value, cu_seq_q.tolist(), scale, window_size)

    for kernel in (with_groups, without_groups):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        attention.varlen_parameters.cache_clear()
        for width in (None, window):
            fast = attention.by_kernel(query, key, value, documents, width, 0.5)
            slow = attention.by_document(query, key, value, documents, width, 0.5, 0.0)
            torch.testing.assert_close(fast, slow)
    attention.varlen_parameters.cache_clear()


def stand_in(query_THD, key_TGD, value_TGD, borders, scale, window_size):
    """Attention by its definition, places and heads one by one."""
    out, times = torch.zeros_like(query_THD), query_THD.shape[1] // key_TGD.shape[1]
    left, right = window_size
    assert right == 0
    for begin, end in pairwise(borders):
        for place in range(begin, end):
            first = begin if left < 0 else max(begin, place - left)
            for head in range(query_THD.shape[1]):
                keys, values = key_TGD[first : place + 1, head // times], value_TGD[first : place + 1, head // times]
                out[place, head] = (keys @ query_THD[place, head] * scale).softmax(0) @ values
    return out
