"""Law 3 and the gradient of a packed row, for every attention that a config may choose."""

from __future__ import annotations

import pytest
import torch
from model_rig import CPU, FAMILIES, folder_of, gradients, learner_of, oracle, row, worst

from finetuner.errors import ConfigError, ModelError
from finetuner.model import attention
from finetuner.model import documents_apart as module
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
    together = module.by_document

    def wrong(query, key, value, documents, window, scaling, dropout):
        return together(query, key, value, (sum(documents),), window, scaling, dropout)

    monkeypatch.setattr(module, "by_document", wrong)
    with pytest.raises(ModelError, match="E-ATTENTION-LEAK"):
        learner_of(family)


def test_positions_that_run_on_are_refused_when_the_learner_is_made(tmp_path, monkeypatch):
    """The mutant: documents are kept apart, but the second one begins where the first one ended."""
    family = folder_of("llama", tmp_path)
    right = CausalLearner.trial

    def wrong(self, *, turned=False):
        return right(self, turned=turned) | {"position_ids": torch.tensor([[0, 1, 2, 3, 5, 7]])}

    monkeypatch.setattr(CausalLearner, "trial", wrong)
    with pytest.raises(ModelError, match="E-ATTENTION-LEAK"):
        learner_of(family)


def test_ours_serves_all_but_soft_capped_models(family):
    assert learner_of(family).attends == ("eager" if "gemma2" in str(family) else "finetuner")


def test_a_sliding_window_is_honoured(tmp_path, monkeypatch):
    folder = folder_of("mistral", tmp_path)
    batch = row((20,))
    true_loss, _ = oracle(folder, batch)
    assert learner_of(folder)(batch).item() == pytest.approx(true_loss, rel=1e-5)
    right = module.band
    monkeypatch.setattr(
        module, "band", lambda start, stop, first, window, device: right(start, stop, first, 99, device)
    )
    assert learner_of(folder)(batch).item() != pytest.approx(true_loss, rel=1e-4), "the mutant sees too far"


@pytest.mark.parametrize(
    ("choice", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_flash_attention_is_refused_before_the_model_is_read_where_it_cannot_be(tmp_path, choice, package, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "find_spec", lambda name: asked.append(name))
    with pytest.raises(ModelError, match="E-ATTENTION-MISSING") as caught:
        learner_of(tmp_path / "nothing", attention=choice, dtype="bfloat16")
    assert asked == [package]
    assert "is not installed" in caught.value.problems[0].found
    assert 'or attention="auto"' in caught.value.problems[0].remedy
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="E-ATTENTION-MISSING") as caught:
        learner_of(tmp_path / "nothing", attention=choice, dtype="bfloat16")
    assert caught.value.problems[0].found == "no CUDA device"
    with pytest.raises(ConfigError, match="E-ATTENTION-DTYPE"):
        learner_of(tmp_path / "nothing", attention=choice, dtype="float32")


@pytest.mark.parametrize("choice", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_borders_and_the_longest_document(choice):
    given = attention.arguments(choice, (3, 2), CPU)
    assert {name: getattr(value, "tolist", lambda value=value: value)() for name, value in given.items()} == {
        "cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 3, 5], "max_length_q": 3, "max_length_k": 3,
    }  # fmt: skip
    assert given["cu_seq_lens_q"].dtype == torch.int32


def test_half_precision_packs_apart_too(tmp_path):
    learner = learner_of(folder_of("llama", tmp_path), dtype="bfloat16")
    with learner.autocast():
        one, two = hidden(learner, row(LENGTHS)), hidden(learner, row(LENGTHS, other=1))
    assert torch.equal(one[:, :7], two[:, :7])
    assert torch.equal(one[:, 16:], two[:, 16:])
    assert not torch.equal(one[:, 7:16], two[:, 7:16])
